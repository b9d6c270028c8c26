"""Templates in the manner of those on the hub: marks, rewritten earlier turns, reasoning, tools, string contents."""

import json

import pytest
import torch

from tpcompress.data import BadRow, ChatCollator, PromptCollator

START, END = "<|im_start|>", "<|im_end|>"
PARTS = "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
BODY = "{% if m['content'] is string %}{{ m['content'] }}{% else %}" + PARTS + "{% endif %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
MARKED = (  # that of LLaVA-OneVision: other blanks than in the prompt, the end token outside the marks
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ '\n' + c['text'] }}{% endgeneration %}"
    "{% else %}{{ '\n' + c['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>' }}{% endfor %}" + ASK
)
ENDS_MARKED = (  # the end token and a line break inside the marks
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}" + BODY + "{{ '<|im_end|>\n' }}{% endgeneration %}{% else %}" + BODY + "{{ '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}" + ASK
)
THINKING = (  # that of Qwen3: reasoning is cut from earlier turns, and an empty one put before the last
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% set text = m['content'][0]['text'].split('</think>')[-1] %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ text.strip() }}"
    "{% else %}" + BODY + "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK
)
TOOLS = (  # that of Qwen2.5
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
    "{% if m['content'] %}{{ '\n' }}" + BODY + "{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + ASK
)
STRINGS = (  # that of Pixtral: parts for users, strings for assistants, strict order
    "{{ '<s>' }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<q>' }}" + PARTS + "{{ '<a>' }}"
    "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "marked": (MARKED, END), "ends marked": (ENDS_MARKED, END), "thinking": (THINKING, END), "tools": (TOOLS, END),
    "strings": (STRINGS, "</s>"),
}  # fmt: skip


def talk(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def row(*messages: dict, **more) -> dict:
    return {"images": [], "conversations": [list(messages)], "families": ["f"]} | more


@pytest.fixture
def processor(request, processor_of):
    return processor_of("chatml", TEMPLATES[request.param][0])


def each(*names: str):
    return pytest.mark.parametrize("processor", names, indirect=True)


def learnt(batch: dict, processor) -> list[str]:
    """Decoded runs of labels of the first sequence."""
    runs: list[list[int]] = [[]]
    for label in batch["labels"][0].tolist():
        runs = [*runs[:-1], [*runs[-1], label]] if label != -100 else [*runs, []] if runs[-1] else runs
    return [processor.tokenizer.decode(run) for run in runs if run]


@each(*TEMPLATES)
@pytest.mark.parametrize("learn_from", ["all", "last"])
def test_answers_are_learnt_with_their_end(processor, learn_from, photo_folder, request):
    end = TEMPLATES[request.node.callspec.params["processor"]][1]
    messages = talk("<image>what is this ?", "a cat", "colour ?", "red", "and this ?", "red")
    sample = row(*messages, images=[str(photo_folder / "chelsea.jpg")])
    batch = ChatCollator(processor, learn_from=learn_from)([sample])
    shown = learnt(batch, processor)
    assert [text.removeprefix("<think>\n\n</think>\n\n").strip() for text in shown] == [
        f"{answer}{end}" for answer in (["a cat", "red", "red"] if learn_from == "all" else ["red"])
    ]
    assert shown[-1].startswith("<think>") == (processor.chat_template == THINKING), "the model writes it itself"
    learnable = batch["labels"] != -100
    assert torch.equal(batch["labels"][learnable], batch["input_ids"][learnable])


@each("strings", "tools", "marked")
@pytest.mark.parametrize("answer", ["a cat</s>", "<|im_end|>", "user ?", "?", "a\n\nb", " red ", "苹果", "wxyzzyk"])
def test_answers_that_look_like_the_template(processor, answer):
    batch = ChatCollator(processor)([row(*talk("?", answer, "?", answer))])
    decoded = "".join(learnt(batch, processor))
    assert decoded.count(answer) >= 2


@each("thinking")
def test_reasoning_that_the_template_cuts_is_not_learnt(processor):
    messages = talk("what ?", "<think>one two</think>\n\na cat", "colour ?", "red")
    assert learnt(ChatCollator(processor)([row(*messages)]), processor)[0] == f"a cat{END}"


@each("tools")
def test_tool_calls_are_learnt_and_tools_are_shown(processor):
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": "cat"}}}]
    messages = [
        {"role": "system", "content": "a woman"},
        {"role": "user", "content": "what is this ?"},
        {"role": "assistant", "content": "", "tool_calls": json.dumps(calls)},
        {"role": "tool", "content": "a cat"},
        {"role": "assistant", "content": "a cat", "tool_calls": json.dumps(calls)},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "red"},
    ]
    tools = json.dumps([{"type": "function", "function": {"name": "look", "parameters": {}}}])
    sample = row(*messages, tools=tools)
    batch = ChatCollator(processor)([sample])
    call = '\n<tool_call>{"name": "look", "arguments": {"at": "cat"}}</tool_call>'
    first, second, third = (text.strip() for text in learnt(batch, processor))
    assert first == f"{call}{END}".strip()
    assert second == f"a cat{call}{END}"
    assert third == f"red{END}"
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert '"parameters": {}' in text.split(END)[0]
    assert "a woman" in text
    assert f"{START}tool\nno{END}" in text
    prompt = PromptCollator(processor)([sample])
    assert processor.tokenizer.decode(prompt["input_ids"][0]) == text.rpartition(f"red{END}")[0]
    with pytest.raises(BadRow, match="^tools are not JSON"):
        ChatCollator(processor)([sample | {"tools": "look"}])


@each("strings")
def test_what_a_template_refuses_is_a_bad_row(processor):
    collator = ChatCollator(processor)
    collator([row(*talk("what ?", "a cat"))])
    with pytest.raises(BadRow, match=r"^the chat template refuses it: roles must alternate$"):
        collator([row({"role": "system", "content": "a woman"}, *talk("what ?", "a cat"))])


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ messages[0]['nothing'] + 'x' }}", "renders no question"),
        ("{{ 'nothing' }}", "does not render user turns"),
        ("{{ messages[0]['content'][0]['text'] }}", "does not render answers"),
    ],
)
def test_a_template_that_cannot_be_learnt_from_is_one_error(template, error, processor_of):
    with pytest.raises(ValueError, match=rf"^The chat template of LlavaProcessor {error}[^\n]*$"):
        ChatCollator(processor_of("chatml", template))


def test_learn_from_is_checked(processor_of):
    with pytest.raises(ValueError, match="^learn_from must be 'all' or 'last', got 'first'"):
        ChatCollator(processor_of("chatml"), learn_from="first")
