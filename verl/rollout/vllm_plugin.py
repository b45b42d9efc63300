"""vLLM's Qwen2.5-VL with two repairs for stored video features, registered as a vLLM plugin.

vLLM leaves `second_per_grid_ts` out of what names a video in its caches, and bounds the visual
tokens of a prompt by its own estimate of the longest video. The entry point
`vllm.general_plugins` of this package makes every vLLM in its environment know the class; engines
that the workers start register it themselves. `python3 -m verl.rollout.vllm_plugin` says whether
all is in place.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import metadata
from typing import Any

from verl.rollout import vllm_compat

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
GROUP, ENTRY = "vllm.general_plugins", "long_rl"
LIMIT = "long_rl_max_video_tokens"
"""Field of `hf_overrides` with the most visual tokens of a prompt; 0: vLLM's own estimate."""


def register() -> None:
    """Makes vLLM use the class for Qwen2.5-VL; called by vLLM in each of its processes."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, _model_class())


@cache
def _model_class() -> type:
    # Classes of vLLM can only be derived from once it is imported, which takes seconds.
    import torch
    from vllm.model_executor.models import qwen2_5_vl, qwen2_vl
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.parse import DictEmbeddingItems

    class Parser(qwen2_vl.Qwen2VLMultiModalDataParser):
        """Takes seconds a grid as a field of each video, hence into its hash and its positions."""

        def _parse_video_data(self, data: Any) -> Any:
            if not isinstance(data, dict):
                return super()._parse_video_data(data)
            n = len(data["video_grid_thw"])
            seconds = data.get("second_per_grid_ts")
            seconds = torch.ones(n) if seconds is None else torch.as_tensor(seconds)
            fields = {"video_embeds", "video_grid_thw", "second_per_grid_ts"}
            return DictEmbeddingItems(
                {**data, "second_per_grid_ts": seconds.to(torch.float32).reshape(n)},
                modality="video",
                required_fields=fields,
                fields_factory=vllm_compat.video_fields(self._spatial_merge_size),
            )

    class Info(qwen2_5_vl.Qwen2_5_VLProcessingInfo):
        def get_data_parser(self) -> Any:
            # 0.26 reads the processor's files with the first prompt else, when they may be gone.
            self.get_hf_processor()
            plain, parser = super().get_data_parser(), Parser.__new__(Parser)
            parser.__dict__.update(plain.__dict__)
            return parser

        def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Any) -> Any:
            most = super().get_mm_max_tokens_per_item(seq_len, mm_counts)
            wanted = getattr(self.get_hf_config(), LIMIT, 0)
            return None if most is None else {kind: max(n, wanted) for kind, n in most.items()}

    @MULTIMODAL_REGISTRY.register_processor(
        qwen2_5_vl.Qwen2_5_VLMultiModalProcessor,
        info=Info,
        dummy_inputs=vllm_compat.dummy_inputs_builder(),
    )
    class StoredFeaturesQwen2_5_VL(qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
        """vLLM's model; only what is said of its inputs differs."""

    return StoredFeaturesQwen2_5_VL


def is_entered() -> bool:
    """Whether this package's entry point is installed, by which vLLM finds the plugin itself."""
    return any(entry.name == ENTRY for entry in metadata.entry_points(group=GROUP))


def main() -> None:
    """Command line entry: what is installed and whether it fits; exit code 1 where it does not."""
    version = vllm_compat.vllm_version()
    if problem := vllm_compat.version_problem(version):
        sys.exit(f"vllm_plugin: {problem}")
    if not is_entered():
        sys.exit(
            f"vllm_plugin: the entry point {GROUP}: {ENTRY} is not installed; install this package "
            "in the environment of vLLM: pip install -e . --no-deps"
        )
    register()
    print(f"vllm_plugin: vLLM {version} takes {ARCHITECTURE} from verl.rollout.vllm_plugin")


if __name__ == "__main__":
    main()
