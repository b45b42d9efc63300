import random
import string
import subprocess
import sys
import time

import pytest

from verl.utils.answers import (
    after_thinking,
    extract_answer,
    last_boxed,
    normalise,
    option_letters,
    score_answer,
)

COLOURS = ("red car", "blue car", "green bus", "yellow bike")
ABCD = option_letters(COLOURS)


def extracted(response: str, options: tuple[str, ...] = COLOURS) -> str | None:
    return extract_answer(response, option_letters(options)).answer


# --- replies that common extractors get wrong ----------------------------------------------------

GOLDEN = [
    ("<think>A is wrong, B too.</think> <answer>C</answer>", "C", "answer_tag"),
    ("<think>Option A shows it. B as well.</think>\n<answer>C.</answer>", "C", "answer_tag"),
    ("Based on the frames, nothing else fits.\nAnswer: C", "C", "stated"),
    ("A man walks across the street. The answer is C.", "C", "stated"),
    ("The answer is not A, it is C.", "C", "stated"),
    ("The correct option is (C), because B and D never happen.", "C", "stated"),
    ("After checking, **C**", "C", "final_line"),
    ("c", "C", "after_think"),
    ("I cannot determine this from the video.", None, "none"),
    ("<think>Maybe A, or B. D is shown. The clip", None, "truncated"),
    ("Both A and B are plausible, but the answer is C", "C", "stated"),
    ("**Answer:** C", "C", "stated"),
    ("The final answer is: **(C)** green bus.", "C", "stated"),
    ("Let me see.\n\nC. green bus", "C", "final_line"),
    ("It is the green bus that arrives last.", "C", "option_text"),
    ("The result: $\\boxed{\\text{C}}$", "C", "boxed"),
    ("Based on what I saw, D never happens. C is correct.", "C", "stated"),
]


@pytest.mark.parametrize(("response", "answer", "layer"), GOLDEN)
def test_awkward_replies_are_read_as_a_person_would(response: str, answer, layer: str):
    found = extract_answer(response, ABCD)
    assert (found.answer, found.layer) == (answer, layer)


@pytest.mark.parametrize(
    "response",
    [
        "<answer>C</answer>", "<answer> C </answer>", "<answer>\nC\n</answer>",
        "<ANSWER>c</ANSWER>",
        "<answer>(C)</answer>", "<answer>**C**</answer>", "<answer>C) green bus</answer>",
        "<answer>C:green bus</answer>", "<answer>The green bus.</answer>",
        "<answer>Option C</answer>", "<answer>The answer is C</answer>",
        "<answer>\\boxed{C}</answer>", "<answer>$\\mathrm{C}$</answer>",
        "<answer>C. It arrives after the others.</answer>",
        "<answer><answer>C</answer></answer>", "<answer>A</answer> No. <answer>C</answer>",
        "<answer>C</answer><answer></answer>", "<answer>C<answer>C</answer>",
        "<answer>C</answer><|im_end|>", "C<|im_end|><|endoftext|>",
        "I will use <answer> tags. <answer>C</answer> </answer>",
        "<think>x</think>reasons<think>y</think><answer>C</answer>",
        "reasons without an opening tag, answer A</think>\n<answer>C</answer>",
    ],
)  # fmt: skip
def test_an_answer_in_tags_is_read_in_whatever_dress(response: str):
    assert extracted(response) == "C"


@pytest.mark.parametrize(
    "response",
    [
        "C", "c", "(c)", "C.", " *C* ", "`C`", "C)", "option c", "Choice (C)", "green bus",
        "C green bus.",
        "Green  Bus", "a green bus", "c: green bus", "\\boxed{green bus}", "<answer>C",
        "Answer: C\n\nThe bus comes last.", "The answer is c.", "The answer is (c)",
        "Therefore, the best option is option C, not B.", "I would choose C.", "I'll go with (C).",
        "I think the answer is A. Wait, no: the answer is C.", "It must be C.",
        "There is no doubt the answer is C.", "The answer is C: green bus", "Correct answer C",
        "The answer is most likely C, since A shows a car.", "The answer is C, A man says so.",
        "Option A is wrong. Option B is wrong. Option C is correct.",
        "Neither A nor B is correct. C is the correct answer.",
        "A. red car\nB. blue car\nC. green bus\nD. yellow bike\n\nThe answer is C.",
        "The options are A. red car B. blue car C. green bus D. yellow bike. Answer: C",
        "It is not the red car. The answer is the green bus.",
        "Answer: C\nthe bus comes last", "The final answer is:\n\n**C**", "(C) is the answer.",
        "Answer:C", "The answer to this is hard. I say (C)", "The answer is: option C, as I said",
        "The red car leaves, the blue car stays; answer: green bus",
    ],
)  # fmt: skip
def test_an_answer_without_tags_is_read_where_it_is_plain(response: str):
    assert extracted(response) == "C"


@pytest.mark.parametrize(
    "response",
    [
        "", "   ", "\n", "?", "E", "<answer>E</answer>", "<answer></answer>",
        "<answer>B and C</answer>",
        "<answer>B or C</answer>", "<answer>A/B</answer>", "<answer>none of them</answer>",
        "The answer is A man.", "The answer is a man in a green coat.", "A man walks.",
        "The answer is A?", "Could it be that the answer is (C)?", "Answer: A man",
        "A is the most common letter.", "Answer: see section C",
        "The answer is\nunclear",
        "Suppose the answer is C.", "Whether C is correct is unclear.", "C seems wrong.",
        "It's C or D.",
        "The answer is not A.", "The answer isn't C.", "I don't think the answer is C.",
        "The answer cannot be C.", "The answer is neither A nor B.", "It is not C", "not C",
        "The answer is A or B.", "The answer is either B or C.", "B or C", "A, B",
        "The answer is A, B.",
        "The answer could be any of A, B, C and D.", "The answer is A and B.", "Is the answer A?",
        "Is the answer (C)?", "If the answer is A, then a car is shown.",
        "I doubt the answer is C.",
        "Option A is wrong.", "Option A shows a car. Option B shows another.",
        "Answer: A is wrong.",
        "A is correct? B is correct?", "I cannot say.", "I am not sure whether it is the red car.",
        "The answer is E.", "The answer is A. Actually, the answer is E.", "The answer is D.C.",
        "The answer is B-52.", "The answer is A's.", "The answer is I think unclear.",
        "A. red car\nB. blue car\nC. green bus\nD. yellow bike", "Options: A, B, C, D",
        "A. red car B. blue car C. green bus D. yellow bike",
        "The red car and the blue car.", "There is no red car.", "not the red car", "C. blue car",
        "Vitamin C", "Plan B was used in section A.", "<answer>C. blue car</answer>",
        "The answer is A. <answer>E</answer>", "**A** or **B**", "abcd", "cc", "C C", "A.B.C.D.",
        "Which of A or B is correct?", "the answer is b c", "answer", "Answer:", "The answer is: ",
    ],
)  # fmt: skip
def test_nothing_is_guessed(response: str):
    assert extract_answer(response, ABCD).answer is None


@pytest.mark.parametrize(
    "response",
    [
        "<think>The answer is A.", "<think><answer>A</answer>", "<think>x</think> A <think>B",
        "The answer is C. <think>Or", "<THINK>\n\nC",
    ],
)  # fmt: skip
def test_a_response_that_ends_in_its_thinking_is_truncated_and_has_no_answer(response: str):
    assert (extract_answer(response, ABCD).answer, extract_answer(response, ABCD).layer) == (
        None, "truncated",
    )  # fmt: skip
    assert extract_answer(response, {}).answer is None
    assert after_thinking(response) is None


def test_what_stands_inside_of_think_is_never_read():
    rng = random.Random(0)
    pieces = [
        "<answer>A</answer>",
        "The answer is B.",
        "\\boxed{A}",
        "red car",
        "**D**",
        "\nA\n",
        "B. x",
    ]
    for _ in range(200):
        thought = " ".join(rng.choices(pieces, k=rng.randrange(6)))
        assert extracted(f"<think>{thought}</think> So: <answer>C</answer>") == "C"
        assert extracted(f"<think>{thought}</think>\nThe answer is C.") == "C"
        assert extracted(f"<think>{thought}</think> I do not know.") is None
        assert extracted(f"{thought}</think> I do not know.") is None
        assert extracted(f"<think>{thought}") is None


@pytest.mark.parametrize(
    ("opened", "closed"),
    [
        ("<thinking>", "</thinking>"), ("<thought>", "</thought>"), ("< think >", "</ think>"),
        ("<reasoning>", "</reasoning>"), ("<analysis>", "</analysis>"), ("[THINK]", "[/THINK]"),
        ("◁think▷", "◁/think▷"), ("<思考>", "</思考>"), ("<Thinking>", "</THINKING>"),
    ],
)  # fmt: skip
def test_reasoning_in_other_tags_is_never_read(opened: str, closed: str):
    for thought in ("The answer is A.", "<answer>A</answer>", "red car", "**A**", "A or B, so B"):
        assert extracted(f"{opened}{thought}{closed} C") == "C"
        assert extracted(f"{opened}{thought}{closed}<answer>C</answer>") == "C"
        assert extracted(f"{opened}{thought}{closed} I do not know.") is None
        assert extract_answer(f"{opened}{thought}", ABCD).layer == "truncated"


@pytest.mark.parametrize(
    "response",
    [
        # An option with words against it.
        "C) is wrong", "C. is wrong", "A. red is wrong", "C. This is wrong.", "C: no", "A) no way",
        "C. green bus is wrong", "C. green bus? No.", "C. green bus is not shown", "C. Wrong",
        "C) can be ruled out", "(C) cannot be right", "C. The option is incorrect.", "C. unlikely",
        "<answer>C) is wrong</answer>", "**C** is wrong", "**C**: wrong", "not **C**",
        "I rule out **C**.", "I rule out the red car.", "It is not\nC", "Wrong options:\nC",
        # What is withdrawn, or is somebody else's.
        "The answer is A. A is wrong.", "The answer is A. On reflection the answer is not A.",
        "The answer is A... wait no, it is C", "The answer is A. No wait, it's C.",
        "The wrong answer is A", "The least likely answer is A", "One possible answer is A",
        "Their answer is A.", "She thinks the answer is A", "One might think the answer is A",
        "It's tempting to say the answer is A", "At first glance, the answer is A.",
        # Several letters.
        "**C** or D", "Both **C** and D", "**C** or **E**", "B\nC", "A, C", "AC", "Answer: A|C",
        "Answer: C; D", "Answer: C D", "The answer is C. And D.", "The answer is C plus D",
        "The answer is C, as well as D.", "C is correct and D is correct",
        "C is correct. D is also correct.", "<answer>AC</answer>", "<answer>C\nD</answer>",
        "\\boxed{A, C}", "<answer>C. green bus and D. yellow bike</answer>",
        # A letter that is not offered, or two, whatever words follow them.
        "The answer is E, the red car.", "The answer is A or B. It is the red car, I think.",
        "The answer is E. I see the **A** mark.", "答案是E，red car", "答案是A或者B。red car",
        "<answer>E. red car</answer>", "E. red car", "<answer>F</answer> red car",
    ],
)  # fmt: skip
def test_what_is_rejected_withdrawn_or_several_is_no_answer(response: str):
    assert extracted(response) is None


@pytest.mark.parametrize(
    "response",
    [
        # Every option but one.
        "<answer>anything but green</answer>", "<answer>everything except green</answer>",
        "anything other than green", "all but green", "It is any colour except green.",
        "The answer is anything but green", "<answer>anything but C</answer>", "not red but",
        # What is said of a box.
        "The answer is not \\boxed{A}", "I rule out \\boxed{A}.", "\\boxed{A} is wrong",
        "The answer is not:\n$$\\boxed{A}$$", "$\\boxed{A}$ is incorrect", "\\boxed{A}? No.",
        "\\boxed{A} or \\boxed{B}", "\\boxed{A} and \\boxed{B}", "If \\boxed{A} then",
        "It isn't \\boxed{green}", "anything but \\boxed{C}", "\\boxed{B}. Actually, C.",
        "\\boxed{B}: green", "The wrong answer is \\boxed{A}", "not \\boxed{\\boxed{A}}",
        # Withdrawals that state nothing else.
        "The answer is B. Actually, C.", "The answer is B... no, C.", "The answer is B. Wait, C.",
        "The answer is B, correction: C", "The answer is B, or rather C", "**B**. Actually, C.",
        "The answer is B. Actually, E.", "The answer is blue. Actually, green.",
        "The answer is B. Actually it is green", "答案是B。其实是C。",
        # A letter with the words of another option.
        "The answer is D) blue", "The answer is D. blue", "The answer is D (blue)", "**D**: blue",
        "The answer is D, blue.", "The answer is D - blue", "<answer>D) blue</answer>",
        "I choose D: the blue one", "Answer: D\nblue", "答案是D：blue。", "\\boxed{D) blue}",
    ],
)  # fmt: skip
def test_what_is_excluded_withdrawn_or_contradicts_itself_is_no_answer(response: str):
    assert extracted(response, ("red", "blue", "green", "yellow")) is None


@pytest.mark.parametrize(
    "response",
    [
        "The answer is \\boxed{C}.", "It is not A. \\boxed{C}", "\\boxed{B} Actually, \\boxed{C}",
        "Having ruled out A and B the answer is \\boxed{C}", "$$\\boxed{C}$$ because A is wrong",
        "The red one is not shown so the answer is \\boxed{C}", "Therefore, \\boxed{C}",
        "\\boxed{C} green", "Not \\boxed{A}. The answer is C.",
        "\\boxed{C) green}. The blue one is wrong.",
        "The answer is B. Correction, the answer is C.", "Answer: B. Actually, the answer is C",
        "The answer is C. No blue is seen.", "The answer is C. Actually, I am sure of C.",
        "The answer is C) green", "The answer is C (green).", "The answer is C: the green one",
        "I would choose C. The blue one is smaller.", "Except for the blue one, all go. Answer: C",
    ],
)  # fmt: skip
def test_an_answer_beside_what_is_excluded_or_withdrawn_is_still_read(response: str):
    assert extracted(response, ("red", "blue", "green", "yellow")) == "C"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is C because A is wrong", "C"),
        ("The answer is C. Wrong options are A and B.", "C"),
        ("Having eliminated A and B the answer is C", "C"),
        ("I initially thought the answer is A, but the answer is C.", "C"),
        ("The answer is C; A and B are wrong.", "C"), ("The answer is C, A is not shown.", "C"),
        ("The answer is C. Wait, let me check. Yes, the answer is C.", "C"),
        ("The only possible answer is C", "C"), ("The most plausible answer is C", "C"),
        ("C. green bus. The other options are incorrect.", "C"), ("**C** because A is wrong", "C"),
        ("C. green bus. Because no bike, no red car is seen", "C"),
        ("C\nExplanation: the bus", "C"), ("Looking at A, B and C... Final answer: D", "D"),
        ("A is incorrect. B is incorrect. C is correct.", "C"),
    ],
)  # fmt: skip
def test_an_answer_that_speaks_of_other_options_is_still_read(response: str, answer: str):
    assert extracted(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("No, he said yes", None), ("Yes, he said no", None), ("She said: yes", None),
        ('He replied "no".', None), ("Did he say yes? No.", None), ("yes or no?", None),
        ("No, the answer is yes", "A"), ("Yes, there is no car left.", "A"),
        ("No, he didn't.", "B"), ('He said "yes". So the answer is No.', "B"),
    ],
)  # fmt: skip
def test_yes_and_no_are_read_only_where_they_are_the_answer(response: str, answer: str | None):
    assert extracted(response, ("Yes", "No")) == answer


def test_a_number_among_other_numbers_is_no_answer():
    assert extracted("The answer: 2, 3", ("1", "2", "3", "4")) is None
    assert extracted("The answer: 2, as there are two", ("1", "2", "3", "4")) == "B"


@pytest.mark.parametrize(
    "response",
    [
        "答案是C", "答案：C", "正确答案是 C", "故选C。", "我选择C。", "选项C是正确的", "C选项正确",
        "A错误，B错误，C正确。", "A项不对，C项正确。",
        "排除A和B，故选C。", "应该选C而不是A", "本题答案选择C项",
        "综上所述，答案为（C）。", "最终答案：**C**",
        "最终答案：C. green bus", "答案是“C”", "答案是c",
        "答案是C，A是错的", "答案是C,不是A", "答案是A。不对，答案是C。", "他选了A，但答案是C",
        "C。", "（C）", "Ｃ", "【C】", "C：green bus", "C。因为车是绿色的", "<answer>Ｃ</answer>",
        "<answer>（C）</answer>", "<answer>选项C</answer>", "<think>答案是A</think>答案是C",
    ],
)  # fmt: skip
def test_answers_in_chinese_are_read(response: str):
    assert extracted(response) == "C"


@pytest.mark.parametrize(
    "response",
    [
        "答案不是A", "不选A", "A不对。", "A是错误的",
        "A。错误", "C：不对", "选A是错的", "错误答案是A",
        "如果答案是A，那么", "如果选A，就错了", "选择A的话就错了",
        "答案是A吗？", "C正确吗？", "选C吗",
        "难道答案是C", "答案可能是A", "答案不一定是A", "答案是A或者C", "答案是A和C", "答案是A、C",
        "答案是C还是D？", "C和D是正确的", "选CD",
        "<answer>C、D</answer>", "A、B、C、D", "（A）（B）",
        "答案是E", "没有正确答案",
        "答案是A。等等，不对。", "答案是A，不对，应该是C", "答案是A？不，是C",
        "答案是A。答案不是A。", "他选了A。", "选手A是正确的", "答案是C罗", "<think>选A",
        "选项A描述了红色的车，选项B描述了蓝色的车。",
    ],
)  # fmt: skip
def test_nothing_is_guessed_in_chinese(response: str):
    assert extracted(response) is None


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("红色。", "A"), ("<answer>红色。</answer>", "A"), ("答案是蓝色，不是红色", "B"),
        ("答案不是红色", None), ("答案是红色吗？", None), ("答案是红色或者蓝色", None),
        ("红色、蓝色", None), ("不是红色", None),
    ],
)  # fmt: skip
def test_chinese_options_are_read_by_their_words(response: str, answer: str | None):
    assert extracted(response, ("红色", "蓝色")) == answer
    assert score_answer("<answer>红色。</answer>", "红色").correct


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "letters"),
    [
        (("A:red", "B:blue"), {"A": "red", "B": "blue"}),
        (("A. red", "B. blue"), {"A": "red", "B": "blue"}),
        (("(A) red", "(B) blue"), {"A": "red", "B": "blue"}),
        (("a) red", "b) blue"), {"A": "red", "B": "blue"}),
        (("red", "blue"), {"A": "red", "B": "blue"}),
        (("B. blue", "A. red"), {"A": "red", "B": "blue"}),
        (("B", "A"), {"A": "", "B": ""}),
        (("I. Newton", "A. Einstein"), {"A": "I. Newton", "B": "A. Einstein"}),
        (("A. Einstein", "I. Newton"), {"A": "A. Einstein", "B": "I. Newton"}),
        (("A. red", "blue"), {"A": "A. red", "B": "blue"}),
        (("A. red", "C. green", "D. blue"), {"A": "red", "C": "green", "D": "blue"}),
        (("A", "C", "D"), {"A": "", "C": "", "D": ""}),
        (("A. red", "A. blue"), {"A": "A. red", "B": "A. blue"}),
        (("1", "2", "3"), {"A": "1", "B": "2", "C": "3"}),
        ((), {}),
    ],
)
def test_options_carry_their_letters_or_count_from_a(options, letters: dict[str, str]):
    assert option_letters(options) == letters


@pytest.mark.parametrize(
    ("question", "letters"),
    [
        ("What comes last?\nA. a cat\nB. a dog\nC. it rains", ["a cat", "a dog", "it rains"]),
        ("What comes last? (A) a cat (B) a dog", ["a cat", "a dog"]),
        ("Which?\nA: x\nB: y\n\nAnswer with a letter.", ["x", "y"]),
        ("Which?\nA.x\nB.y", ["x", "y"]),
        ("At 10 A.M. or in 5 B.C., who came?", []),
        ("Who is Mr. A. Smith?", []),
        ("What does the man do?", []),
    ],
)
def test_options_are_found_in_a_question(question: str, letters: list[str]):
    assert list(option_letters((), question).values()) == letters


@pytest.mark.parametrize("n", range(2, 11))
def test_two_to_ten_options_are_read_by_letter_and_by_text(n: int):
    options = tuple(f"{string.ascii_lowercase[-i - 1] * 5} thing" for i in range(n))
    for i, letter in enumerate(string.ascii_uppercase[:n]):
        for said in (
            letter,
            letter.lower(),
            f"The answer is {letter}.",
            f"It was the {options[i]}.",
        ):
            assert extracted(said, options) == letter, said
        assert extracted(f"<answer>{letter}. {options[i]}</answer>", options) == letter
    assert extracted(string.ascii_uppercase[n], options) is None
    assert extracted("I cannot determine this.", options) is None
    assert extracted("The answer is I think not visible.", options) is None


def test_more_options_than_letters_are_compared_by_text():
    options = tuple(f"thing {i}" for i in range(30))
    assert option_letters(options) == {}
    assert score_answer("<answer>thing 28</answer>", "thing 28", options).correct


def test_an_option_inside_of_a_longer_option_is_not_mentioned_by_it():
    assert extracted("He takes the red sports car.", ("car", "red sports car")) == "B"
    assert extracted("He takes the car.", ("car", "red sports car")) == "A"


def test_numbers_and_small_words_count_only_as_a_whole_statement():
    assert extracted("The answer is 3.", ("2", "3", "12")) == "B"
    assert extracted("3", ("2", "3", "12")) == "B"
    assert extracted("At 3 seconds he leaves.", ("2", "3", "12")) is None
    assert extracted("The clip takes 12.3 s", ("2", "3", "12")) is None
    assert extracted("Yes, the man opens it.", ("Yes", "No")) == "A"
    assert extracted("I see no car.", ("Yes", "No")) is None


# --- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "correct", "strict"),
    [
        ("<answer>C</answer>", True, True),
        ("<answer>\n C \n</answer>", True, True),
        ("<think>A</think><answer>A</answer><answer>C</answer>", True, True),
        ("<answer>C.</answer>", True, False),
        ("<answer>c</answer>", True, False),
        ("<answer>C. green bus</answer>", True, False),
        ("<answer>C", True, False),
        ("C", True, False),
        ("<answer>A</answer>", False, False),
        ("<think><answer>C</answer></think> A", False, False),
        ("<think><answer>C</answer>", False, False),
        ("", False, False),
    ],
)
def test_strict_wants_the_bare_letter_in_closed_tags(response: str, correct: bool, strict: bool):
    score = score_answer(response, "C", COLOURS)
    assert (score.correct, score.strict) == (correct, strict)


@pytest.mark.parametrize("gold", ["C", "c", "C.", "(C)", "C. green bus", "green bus", "Green bus."])
def test_a_gold_answer_is_a_letter_or_its_text(gold: str):
    assert score_answer("<answer>C</answer>", gold, COLOURS).correct
    assert score_answer("<answer>C</answer>", f"<answer>\n{gold}\n</answer>", COLOURS).strict
    assert not score_answer("<answer>B</answer>", gold, COLOURS).correct


def test_a_gold_answer_that_is_no_option_is_never_matched():
    assert not score_answer("<answer>E</answer>", "E", COLOURS).correct
    assert score_answer("<answer>E</answer>", "E", COLOURS).extracted is None


def test_options_in_the_question_serve_like_a_list():
    question = "What comes last?\nA. a cat\nB. a dog"
    score = score_answer("I saw it: the answer is B.", "B", (), question)
    assert score.correct and not score.strict
    assert score_answer("a dog", "B", (), question).correct
    # A question that only looks as if it had options.
    assert score_answer("<answer>Caesar</answer>", "Caesar", (), question).strict


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("<answer> 42 </answer>", "42"), ("<answer>42.0</answer>", "42"), ("42", "42.00"),
        ("<answer>1,000</answer>", "1000"), ("\\boxed{-3.50}", "-3.5"), ("<answer>+7</answer>",
        "7"),
        ("<answer>.5</answer>", "0.5"), ("<answer>007</answer>", "7"), ("<answer>-0</answer>", "0"),
        ("<answer>\u22123</answer>", "-3"), ("<answer>$5$</answer>", "5"),
        ("<answer>The Red Car.</answer>", "red car"), ("red  car", "Red car"),
        ("<think>blue</think>\na red\ncar", "red car"), ("<answer>A</answer>", "a"),
        ("<answer>?</answer>", "?"),
    ],
)  # fmt: skip
def test_open_answers_are_equal_as_text_or_as_numbers(response: str, gold: str):
    assert score_answer(response, gold).correct


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("<answer>1234567</answer>", "1234568"), ("<answer>.5</answer>", "5"), ("5%", "5"),
        ("<answer>1</answer>", "21"), ("<answer>12,34</answer>", "1234"), ("<answer>!</answer>",
        "?"),
        ("<answer></answer>", "42"), ("", "."), ("<think>42</think>", "42"), ("<think>42", "42"),
        ("<answer>red car or blue car</answer>", "red car"), ("red", "red car"), ("1e1", "10"),
        (f"<answer>{10**30 + 1}</answer>", f"{10**30}"), ("<answer>-3</answer>", "3"),
    ],
)  # fmt: skip
def test_open_answers_that_differ_are_wrong(response: str, gold: str):
    assert not score_answer(response, gold).correct


def test_normalise_is_idempotent():
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("aA the.1,0-+ \n(*)", k=rng.randrange(12)))
        once = normalise(text)
        assert normalise(once) == once, text


def test_boxes_nest_to_any_depth_and_the_last_one_counts():
    assert last_boxed(r"\boxed{1} then \boxed{\frac{\sqrt{2}}{3^{4}}}") == r"\frac{\sqrt{2}}{3^{4}}"
    assert last_boxed(r"\boxed{\boxed{C}}") == "C"
    assert last_boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert last_boxed(r"a set {1, 2 and \boxed {C}") == "C"
    assert last_boxed(r"\boxed{unclosed") == ""


# --- properties ----------------------------------------------------------------------------------

PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "A", "B", "C", "D", "E", "c",
    "a", "I", "The answer is", "answer:", "option", "is correct", "is wrong", "not", "isn't", "or",
    "and", ".", ",", "?", "\n", "**", "(", ")", "red car", "green bus", "blue car", "yellow bike",
    "C. green bus", "it is", "because", "if", "42", "<|im_end|>",
]  # fmt: skip


def random_responses(n: int) -> list[str]:
    rng = random.Random(2)
    return [rng.choice(["", " "]).join(rng.choices(PIECES, k=rng.randrange(14))) for _ in range(n)]


def test_for_random_responses_the_answer_is_an_offered_letter_and_lenient_includes_strict():
    found = 0
    for response in random_responses(1500):
        for letters in (ABCD, {"A": "", "B": ""}, option_letters(COLOURS[:3])):
            answer = extract_answer(response, letters).answer
            assert answer is None or answer in letters, response
        for gold in ("A", "C", "green bus"):
            score = score_answer(response, gold, COLOURS)
            assert score.correct or not score.strict, response
            assert not score.correct or score.extracted in ABCD, response
            found += score.correct
        assert score_answer(response, "42").correct >= score_answer(response, "42").strict
    assert found > 200


def test_permuting_the_options_permutes_the_answer():
    rng = random.Random(3)
    words = ["red car", "blue car", "green bus", "yellow bike", "old red tram"]
    templates = ["It is the {t}.", "<answer>{t}</answer>", "<answer>{l}</answer>", "{l}. {t}",
    "({l})",
                 "The answer is {l}, because of it.", "<think>A</think>{l}", "not so", "{t} or {u}",
                 "\\boxed{{{l}}}", "The answer is not {k}, it is {l}.", "Answer: {t}"]  # fmt: skip
    for _ in range(300):
        shuffled = rng.sample(words, len(words))
        template = rng.choice(templates)

        def answered(order: list[str], target: str, other: str, template: str = template):
            named = {"t": target, "u": other, "l": "ABCDE"[order.index(target)],
                     "k": "ABCDE"[order.index(other)]}  # fmt: skip
            letter = extracted(template.format(**named), tuple(order))
            return letter and order["ABCDE".index(letter)]

        target, other = rng.sample(words, 2)
        assert answered(words, target, other) == answered(shuffled, target, other), template


# --- cost ----------------------------------------------------------------------------------------

LOOPS = [
    "<answer>", "<answer>A</answer>", "<think>", "<think></think>", "\\boxed{", "\\boxed{{}", "}",
    "\\", "\\text{", " ", "\n", "\t ", "A", "A ", "(A) ", "A. x ", "A. red car\n", "**A**", "*",
    "((",
    "answer ", "answer is ", "answer is A ", "answer is A or ", "if answer is A, ", "it is A ",
    "A is correct ", "option option ", "red car ", "not red car ", "answer: red car ", "no", "3.",
    "1,000", "1", "$", "<|", "<|a|>", "ſ", "C\n", "C is correct and ", "not A ", "wait ", "[think]",
    "A is also correct ", "选A", "答案是A ", "答案是A, ",
    "actually, C ", "no, C", ". Wait, ", "\\boxed{A} ", "\\boxed{A} or ", "not \\boxed{\\boxed{A}}",
    "except ", "answer is D) blue ", "。其实C", "A是正确的, ", "A和", "不是A ", "答案是", "不对,",
]  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS)
def test_no_text_makes_extraction_slow(loop: str):
    options = (*COLOURS, "red", "3", "no", "a " * 50)
    response = (loop * (100_000 // len(loop) + 1))[:100_000]
    for text in (
        response,
        "<answer>" + response + "</answer>",
        "\\boxed{" + response,
        response + "!",
    ):
        start = time.process_time()
        score_answer(text, "C", options)
        # A watchdog, not a figure: linear work takes half a second, quadratic work minutes.
        assert time.process_time() - start < 20, text[:40]
    start = time.process_time()
    score_answer(response, "some text")
    score_answer("x", response)
    option_letters((), response)
    assert time.process_time() - start < 20, response[:40]


def test_the_module_imports_no_torch():
    code = "import sys, verl.utils.answers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
