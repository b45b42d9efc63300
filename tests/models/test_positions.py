import pytest
import torch

from verl.models.positions import VisualSpan, mrope_positions


def reference(is_visual: list[bool], spans: list[VisualSpan], merge: int, tps: float):
    """The rule token by token, as vLLM 0.26 to 0.32 state it."""
    rows, next_position, i = [], 0, 0
    queue = list(spans)
    while i < len(is_visual):
        if not is_visual[i]:
            rows.append((next_position,) * 3)
            next_position += 1
            i += 1
            continue
        span = queue.pop(0)
        t, h, w = span.grid_thw[0], span.grid_thw[1] // merge, span.grid_thw[2] // merge
        block = [
            (int(a * (span.seconds_per_grid * tps)), b, c)
            for a in range(t)
            for b in range(h)
            for c in range(w)
        ]
        rows.extend(tuple(x + next_position for x in r) for r in block)
        next_position = max(max(r) for r in rows) + 1
        i += len(block)
    return torch.tensor(rows).T


def layout(*parts: int | VisualSpan):
    is_visual, spans = [], []
    for part in parts:
        if isinstance(part, VisualSpan):
            t, h, w = part.grid_thw
            is_visual += [True] * (t * h * w // 4)
            spans.append(part)
        else:
            is_visual += [False] * part
    return is_visual, spans


@pytest.mark.parametrize(
    "parts",
    [
        (7,),
        (5, VisualSpan((4, 4, 6), 1.0), 6),
        (5, VisualSpan((16, 26, 46), 0.5), 3),
        (2, VisualSpan((128, 4, 4), 8.0), 6),
        (1, VisualSpan((1, 8, 4), 0.0), 2, VisualSpan((3, 4, 4), 0.7), 4),
        (1, VisualSpan((1, 4, 4), 0.0), VisualSpan((2, 4, 4), 1.3), 1),
        (VisualSpan((2, 4, 4), 1.0),),
    ],
)
@pytest.mark.parametrize("tps", [1, 2, 4])
def test_positions_follow_the_rule_token_by_token(parts, tps):
    is_visual, spans = layout(*parts)
    got = mrope_positions(torch.tensor(is_visual), spans, merge_size=2, tokens_per_second=tps)
    assert torch.equal(got, reference(is_visual, spans, 2, tps))


def test_text_after_a_long_video_starts_past_the_whole_video():
    is_visual, spans = layout(6, VisualSpan((128, 16, 28), 1.0), 1)
    got = mrope_positions(torch.tensor(is_visual), spans, merge_size=2, tokens_per_second=2)
    assert got[:, -1].tolist() == [261, 261, 261]  # transformers 5.19 answers 20


def test_a_cut_visual_span_is_refused():
    is_visual, spans = layout(2, VisualSpan((2, 4, 4), 1.0), 3)
    with pytest.raises(ValueError, match="must never be cut"):
        mrope_positions(torch.tensor(is_visual[:6]), spans, merge_size=2, tokens_per_second=2)


def test_text_inside_a_visual_span_is_refused():
    is_visual, spans = layout(2, VisualSpan((2, 4, 4), 1.0), 3)
    is_visual[4], is_visual[-1] = False, True
    with pytest.raises(ValueError, match="interrupted by text"):
        mrope_positions(torch.tensor(is_visual), spans, merge_size=2, tokens_per_second=2)
