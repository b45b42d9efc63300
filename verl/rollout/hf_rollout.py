"""The built-in rollout engine: the transformers model with a key-value cache on stored embeddings.

It needs nothing installed beyond transformers and is the oracle for faster engines. A prompt is
prefilled once for its n samples, which then share its keys and values.
Letters: G prompts of a wave, n samples a prompt that run at once, B = G * n rows, N heads, K
key-value heads, D head dim, P prompt tokens, R response tokens, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from verl.models.adapter import Adapter
from verl.models.loader import drop_tower, materialize
from verl.models.logprobs import logits_of
from verl.rollout import RolloutOutput, RolloutRequest, SamplingParams
from verl.rollout.sampling import draw, uniform
from verl.sequence_parallel.attention import PackedAttention
from verl.sequence_parallel.layout import Layout
from verl.sequence_parallel.packing import Group, pack


class HFRollout:
    """Batched sampling from a transformers model that holds whole, unsharded weights.

    `max_batched_tokens` bounds the tokens whose keys and values are held at once. A wave of prompts
    holds each prompt once, padded to the longest, and room for `max_tokens` words of each sample. A
    prompt that does not fit with all of its samples is a wave of its own and is prefilled once;
    its samples run in parts that fit, one by one at the least. Only a prompt that does not fit
    with a single sample exceeds the bound.
    """

    def __init__(
        self, hf: nn.Module, adapter: Adapter, device: torch.device, max_batched_tokens: int
    ) -> None:
        self._adapter = adapter
        self._device = device
        self._budget = max_batched_tokens
        self._hf = hf.to(device).eval().requires_grad_(False)
        self._forbidden = torch.tensor(adapter.forbidden_ids, device=device)

    @classmethod
    def with_empty_weights(
        cls, hf: nn.Module, adapter: Adapter, device: torch.device, max_batched_tokens: int
    ) -> HFRollout:
        """An engine from a model on the meta device, to be filled by `load_weights`.

        Embeddings come from outside, so the vision tower is dropped.
        """
        drop_tower(adapter, hf)
        materialize(hf, device)
        return cls(hf, adapter, device, max_batched_tokens)

    def start_up_seconds(self) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self._hf.to(self._device)
        own = dict(self._hf.named_parameters(remove_duplicate=False))
        seen = set()
        for name, value in named:
            if name in own:
                own[name].copy_(value)
                seen.add(name)
        if missing := sorted(own.keys() - seen):
            raise ValueError(f"weight sync left parameters behind: {missing[:5]}")

    def sleep(self) -> None:
        if self._device.type == "cuda":
            self._hf.to("cpu")
            torch.cuda.empty_cache()

    def asleep_bytes(self) -> int:
        return 0

    @torch.no_grad()
    def generate(
        self, requests: Sequence[RolloutRequest], params: SamplingParams
    ) -> list[list[RolloutOutput]]:
        outputs: dict[int, list[RolloutOutput]] = {}
        prompt_lens = [len(r.prompt_ids) for r in requests]
        n_samples = [len(r.seeds) for r in requests]
        for wave in self.waves(prompt_lens, n_samples, params.max_tokens):
            for index, samples in zip(
                wave, self._decode([requests[i] for i in wave], params), strict=True
            ):
                outputs[index] = samples
        return [outputs[i] for i in range(len(requests))]

    def waves(
        self, prompt_lens: Sequence[int], n_samples: Sequence[int], max_tokens: int
    ) -> list[list[int]]:
        """Numbers of the requests that run together: of like length and equal sample count.

        `generate` keeps a wave together when it is given one, so a caller that prepares one wave
        after another needs the features of one wave only.
        """
        order = sorted(range(len(prompt_lens)), key=lambda i: (n_samples[i], prompt_lens[i]))
        waves: list[list[int]] = []
        for i in order:
            # Lengths ascend within a wave, so that this prompt is the longest so far.
            each = prompt_lens[i] + n_samples[i] * max_tokens
            same = waves and n_samples[waves[-1][0]] == n_samples[i]
            if same and (len(waves[-1]) + 1) * each <= self._budget:
                waves[-1].append(i)
            else:
                waves.append([i])
        return waves

    def _decode(
        self, requests: Sequence[RolloutRequest], params: SamplingParams
    ) -> list[list[RolloutOutput]]:
        """Samples of one wave; all at once, or in parts where the wave is too large a group."""
        logits_GV, cache = self._prefill(requests, params)
        next_G = torch.tensor([int(r.positions.max()) + 1 for r in requests])
        size = self._samples_at_once(requests, params.max_tokens)
        outputs: list[list[RolloutOutput]] = [[] for _ in requests]
        for first in range(0, len(requests[0].seeds), size):
            seeds_Gn = torch.tensor([r.seeds[first : first + size] for r in requests])
            part = self._sample(logits_GV, next_G, seeds_Gn, cache, params)
            n = seeds_Gn.shape[1]
            for g, samples in enumerate(outputs):
                samples.extend(part[g * n : (g + 1) * n])
        return outputs

    def _samples_at_once(self, requests: Sequence[RolloutRequest], max_tokens: int) -> int:
        """Samples of each prompt of a wave that fit together, evenly many in every part."""
        n, longest = len(requests[0].seeds), max(len(r.prompt_ids) for r in requests)
        fit = (self._budget // len(requests) - longest) // max_tokens
        n_parts = math.ceil(n / max(1, fit))
        return math.ceil(n / n_parts)

    def _sample(
        self,
        logits_GV: Tensor,
        next_G: Tensor,
        seeds_Gn: Tensor,
        cache: _SharedPromptCache,
        params: SamplingParams,
    ) -> list[RolloutOutput]:
        """One sample a seed, B of them, from prompts in the cache and the logits after them."""
        n = seeds_Gn.shape[1]
        cache.begin(n)
        logits_BV = logits_GV.repeat_interleave(n, dim=0)
        seeds_B = seeds_Gn.flatten()
        next_B = next_G.repeat_interleave(n).to(self._device)
        rows_B = torch.arange(len(seeds_B))  # which sample each live row belongs to
        state = _Responses(len(seeds_B), params)
        for step in range(params.max_tokens):
            words_B = draw(
                logits_BV, uniform(seeds_B[rows_B], step),
                temperature=params.temperature, top_p=params.top_p, top_k=params.top_k,
            )  # fmt: skip
            logp_B = torch.log_softmax(logits_BV, -1).gather(1, words_B[:, None]).squeeze(1)
            state.append(rows_B, words_B.cpu(), logp_B.cpu())
            if step + 1 == params.max_tokens:
                break
            live_G = state.live.view(-1, n)[cache.groups].any(1)
            if not live_G.any():
                break
            if not live_G.all():
                keep = live_G.repeat_interleave(n)
                rows_B, words_B = rows_B[keep], words_B[keep.to(self._device)]
                cache.drop(live_G)
            hidden_BE = self._step(words_B, next_B[rows_B.to(self._device)] + step, cache)
            logits_BV = self._logits(hidden_BE, params)
        return state.outputs()

    def _prefill(
        self, requests: Sequence[RolloutRequest], params: SamplingParams
    ) -> tuple[Tensor, _SharedPromptCache]:
        groups = [Group(r.prompt_ids, r.positions) for r in requests]
        row = pack(groups).to(self._device)
        features = [r.features for r in requests if r.features is not None]
        embeds = self._adapter.embed(
            self._hf, row.ids_S, torch.cat(features).to(self._device) if features else None
        )
        recorder = _PrefillRecorder(row.layout, self._device)
        hidden_SE = self._adapter.hidden(self._hf, embeds, row.positions_3S, recorder)
        lens = torch.tensor(row.layout.lengths)
        last = (lens.cumsum(0) - 1).to(self._device)
        cache = _SharedPromptCache(recorder.keys_values, lens, params.max_tokens, self._device)
        return self._logits(hidden_SE[last], params), cache

    def _step(self, words_B: Tensor, positions_B: Tensor, cache: _SharedPromptCache) -> Tensor:
        embeds_BE = self._adapter.embed(self._hf, words_B, None)
        hidden_BE = self._adapter.hidden(
            self._hf, embeds_BE, positions_B[None].expand(3, -1), cache
        )
        cache.advance()
        return hidden_BE

    def _logits(self, hidden_BE: Tensor, params: SamplingParams) -> Tensor:
        head = self._adapter.head(self._hf).weight
        return logits_of(hidden_BE, head, params.temperature or 1.0, self._forbidden)


class _Responses:
    """Words drawn so far and which samples still go on."""

    def __init__(self, n_rows: int, params: SamplingParams) -> None:
        self._params = params
        self._words: list[list[int]] = [[] for _ in range(n_rows)]
        self._log_probs: list[list[float]] = [[] for _ in range(n_rows)]
        self.live = torch.ones(n_rows, dtype=torch.bool)

    def append(self, rows_B: Tensor, words_B: Tensor, logp_B: Tensor) -> None:
        for row, word, logp in zip(rows_B.tolist(), words_B.tolist(), logp_B.tolist(), strict=True):
            if not self.live[row]:
                continue
            self._words[row].append(word)
            self._log_probs[row].append(logp)
            if word in self._params.stop_ids and not self._params.ignore_eos:
                self.live[row] = False

    def outputs(self) -> list[RolloutOutput]:
        return [
            RolloutOutput(
                torch.tensor(words, dtype=torch.long),
                torch.tensor(logps, dtype=torch.float32),
                "length" if live else "stop",
            )
            for words, logps, live in zip(
                self._words, self._log_probs, self.live.tolist(), strict=True
            )
        ]


class _PrefillRecorder(PackedAttention):
    """Prompt attention that remembers each layer's keys and values."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        super().__init__(layout, device)
        self.keys_values: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(
        self, layer: int, q_NSD: Tensor, k_KSD: Tensor, v_KSD: Tensor, scale: float
    ) -> Tensor:
        self.keys_values[layer] = (k_KSD, v_KSD)
        return super().__call__(layer, q_NSD, k_KSD, v_KSD, scale)


class _SharedPromptCache:
    """Attention of one new word a row to its prompt, stored once a group, and to its own past.

    It empties `keys_values`, and `begin` comes before the first word.
    """

    def __init__(
        self,
        keys_values: dict[int, tuple[Tensor, Tensor]],
        lens_G: Tensor,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        n_groups, longest = len(lens_G), int(lens_G.max())
        self.groups = torch.arange(n_groups)
        self._max_tokens = max_tokens
        starts = lens_G.cumsum(0) - lens_G
        offsets = torch.arange(longest)
        valid_GP = offsets[None] < lens_G[:, None]
        index_GP = torch.where(valid_GP, starts[:, None] + offsets, starts[:, None]).to(device)
        self._hidden_GP = ~valid_GP.to(device)
        self._prompt: dict[int, list[Tensor]] = {}
        for layer in list(keys_values):
            pair = keys_values.pop(layer)  # Two copies of one layer at a time, not of all.
            self._prompt[layer] = [x[:, index_GP].transpose(0, 1).contiguous() for x in pair]

    def begin(self, n: int) -> None:
        """Room for `n` new samples of each prompt; what earlier samples stored is gone."""
        self._n = n
        self._filled = 0
        self._own: dict[int, list[Tensor]] = {}
        for layer, pair in self._prompt.items():
            n_groups, k_heads, _, dim = pair[0].shape
            shape = (n_groups * n, k_heads, self._max_tokens, dim)
            self._own[layer] = [x.new_zeros(shape) for x in pair]

    def advance(self) -> None:
        """The new words of all layers are stored; the next call is one position further."""
        self._filled += 1

    def drop(self, live_G: Tensor) -> None:
        """Forgets prompts whose samples have all ended."""
        device = self._hidden_GP.device
        rows = live_G.repeat_interleave(self._n).to(device)
        groups = live_G.to(device)
        self.groups = self.groups[live_G]
        self._hidden_GP = self._hidden_GP[groups]
        self._prompt = {i: [x[groups] for x in pair] for i, pair in self._prompt.items()}
        self._own = {i: [x[rows] for x in pair] for i, pair in self._own.items()}

    def __call__(
        self, layer: int, q_NSD: Tensor, k_KSD: Tensor, v_KSD: Tensor, scale: float
    ) -> Tensor:
        (prompt_k, prompt_v), (own_k, own_v) = self._prompt[layer], self._own[layer]
        n_heads, rows, dim = q_NSD.shape
        k_heads, n_groups = k_KSD.shape[0], len(self.groups)
        own_k[:, :, self._filled] = k_KSD.transpose(0, 1)
        own_v[:, :, self._filled] = v_KSD.transpose(0, 1)
        past = slice(0, self._filled + 1)
        share = n_heads // k_heads  # query heads a key-value head serves
        q_BKHD = q_NSD.transpose(0, 1).view(rows, k_heads, share, dim) * scale
        # One product a group serves all of its samples: the prompt's keys are never copied.
        q_GKnHD = q_BKHD.view(n_groups, self._n, k_heads, share, dim).transpose(1, 2)
        on_prompt = q_GKnHD.reshape(n_groups, k_heads, -1, dim) @ prompt_k.transpose(-1, -2)
        on_prompt = on_prompt.masked_fill(self._hidden_GP[:, None, None], float("-inf"))
        on_prompt = on_prompt.view(n_groups, k_heads, self._n, share, -1).transpose(1, 2)
        on_own = q_BKHD @ own_k[:, :, past].transpose(-1, -2)
        scores = torch.cat([on_prompt.reshape(rows, k_heads, share, -1), on_own], dim=-1)
        weights = torch.softmax(scores.float(), dim=-1).to(q_NSD.dtype)
        n_prompt = prompt_k.shape[2]
        prompt_weights = weights[..., :n_prompt].view(n_groups, self._n, k_heads, share, n_prompt)
        prompt_weights = prompt_weights.transpose(1, 2).reshape(n_groups, k_heads, -1, n_prompt)
        from_prompt = (prompt_weights @ prompt_v).view(n_groups, k_heads, self._n, share, dim)
        out_BKHD = from_prompt.transpose(1, 2).reshape(rows, k_heads, share, dim)
        out_BKHD = out_BKHD + weights[..., n_prompt:] @ own_v[:, :, past]
        return out_BKHD.reshape(rows, n_heads, dim)
