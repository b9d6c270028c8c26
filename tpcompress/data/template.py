"""Chat templates: render a conversation, and find the answers in the rendered text.

Answers are found by `{% generation %}` marks if the template has them. Otherwise the conversation is rendered a second
time with a unique word in place of each answer; what lies between these words is the same in both renderings. Neither
way requires that a template only appends: earlier turns may be rendered differently in a longer conversation.
"""

import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any, Literal, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from tpcompress.data.answers import Span, aligned, content_text, parsed, replaced_text
from tpcompress.data.rows import IMAGE_MARKER, BadRow
from tpcompress.errors import first_line

VIDEO_MARKER = "<video>"
MARKERS = {"image": IMAGE_MARKER, "video": VIDEO_MARKER}
LearnFrom = Literal["all", "last"]
_WORD = "wxyzzy"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    """A conversation as text: the text, the (start, end) of what is learned, and further inputs of the processor."""

    text: str
    spans: list[Span]
    more: dict[str, Any]


class ChatTemplate:
    """The chat template of a processor.

    If the template does not end answers with an end token (that of llava-1.5 does not), the model would not learn to
    stop; the tokenizer's eos token is then appended to every answer.

    Args:
        processor: processor with a chat template of its own or of its tokenizer.
        learn_from: `all` answers of a conversation, or the `last` one only.

    Attributes:
        end: text with which the template ends an answer, without blanks after it; empty if there is none.
        appended_end: end token that is appended to answers; empty if the template has its own.

    Raises:
        ValueError: there is no template, it does not render answers, or there is no token to end them with.
    """

    def __init__(self, processor: Any, learn_from: LearnFrom = "all") -> None:  # a ProcessorMixin; attributes differ
        if learn_from not in ("all", "last"):
            raise ValueError(f"learn_from must be 'all' or 'last', got {learn_from!r}.")
        self.name = type(processor).__name__
        self.processor = processor
        self.learn_from = learn_from
        own = processor.chat_template or processor.tokenizer.chat_template
        if not own:
            raise ValueError(f"{self.name} has no chat template; set processor.chat_template to that of its family.")
        self._own = own.get("default") if isinstance(own, dict) else own
        self._marked = bool(_MARKS.search(self._own or ""))
        self._parts: dict[str, bool] = {}
        self.header = self._header()
        self.end = self._end()
        if not self.end and processor.tokenizer.eos_token is None:
            raise ValueError("The chat template ends no answer and the tokenizer has no eos_token; set one of them.")
        self.appended_end = "" if self.end else processor.tokenizer.eos_token

    def conversation(
        self, messages: Sequence[dict[str, str]], counts: dict[str, int], tools: Any = None, prompt: bool = False
    ) -> Rendered:
        """A conversation as text.

        Args:
            messages: messages of a row.
            counts: number of media of the row by kind (`image`, `video`).
            tools: tool schemas.
            prompt: end with the start of an answer.

        Raises:
            BadRow: the template refuses the conversation, drops an answer, or markers and media do not match.
        """
        text, spans = self.with_answers(self.messages(messages, counts), tools, prompt)
        return Rendered(text, spans, {})

    def messages(self, messages: Sequence[dict[str, str]], counts: dict[str, int]) -> list[dict[str, Any]]:
        """Messages in the format of the template; media without a marker are placed before the first user turn.

        Args:
            messages: messages of a row.
            counts: number of media of the row by kind (`image`, `video`).

        Raises:
            BadRow: markers and media do not match.
        """
        missing = ""
        for kind, marker in MARKERS.items():
            found = sum(message["content"].count(marker) for message in messages if message["role"] != "assistant")
            if found not in (0, counts[kind]) or (found and not counts[kind]):
                raise BadRow(f"{kind} markers: {found} for {counts[kind]} {kind}s")
            missing += "" if found else f"{marker}\n" * counts[kind]
        converted = []
        for message in messages:
            content, role = message["content"], message["role"]
            if missing and role == "user":
                content, missing = missing + content, ""
            turn = {"role": role, "content": self._content(content, role)}
            if message.get("tool_calls"):
                turn["tool_calls"] = parsed(message["tool_calls"], "tool_calls")
            converted.append(turn)
        if missing:
            raise BadRow("no user turn: the media have no place")
        return converted

    def render(self, messages: list[dict[str, Any]], tools: Any = None, prompt: bool = False) -> str:
        """The conversation as text, with the start of an answer if it is a `prompt`.

        Raises:
            BadRow: the template refuses the conversation.
        """
        more: dict[str, Any] = {} if self.processor.chat_template else {"chat_template": self._own}
        more |= {"tools": tools} if tools else {}
        try:
            # A copy, because some templates and processors change the messages they are given.
            copies = [dict(message) for message in messages]
            return self.processor.apply_chat_template(copies, add_generation_prompt=prompt, tokenize=False, **more)
        except Exception as error:  # templates raise jinja's errors and any of Python's
            raise BadRow(f"the chat template refuses it: {first_line(error)[:200]}") from None

    def with_answers(
        self, messages: list[dict[str, Any]], tools: Any = None, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The rendered conversation with the appended end tokens, and the (start, end) of what is learned.

        Raises:
            BadRow: the template refuses the conversation or does not render an answer as it stands.
        """
        text = self.render(messages, tools, prompt)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            return text, []
        found = (
            (self._marked and self._marked_spans(text, messages, tools, prompt))
            or self._header_spans(text, messages, turns, prompt)
            or self._word_spans(text, messages, turns, tools, prompt)
        )
        ended, shift, pieces, cursor = [], 0, [], 0
        for start, stop in found:
            stop, appended = self._ended(text, start, stop)
            pieces += [text[cursor:stop], appended]
            ended.append((start + shift, stop + shift + len(appended)))
            shift, cursor = shift + len(appended), stop
        return "".join([*pieces, text[cursor:]]), ended[-1:] if self.learn_from == "last" else ended

    def _ended(self, text: str, start: int, stop: int) -> tuple[int, str]:
        """Where an answer ends with its end token, and the token to append there."""
        if self.end:
            if text.startswith(self.end, stop):
                return stop + len(self.end), ""
            kept = len(text[start:stop].rstrip())
            return (start + kept if text[start : start + kept].endswith(self.end) else stop), ""
        return start + len(text[start:stop].rstrip()), self.appended_end

    def _marked_spans(self, text: str, messages: list[dict[str, Any]], tools: Any, prompt: bool) -> list[Span]:
        """The answers by the marks of the template; empty if it does not mark every answer."""
        made: Any = render_jinja_template(
            [messages], tools=tools or None, chat_template=self._own, return_assistant_tokens_mask=True,
            add_generation_prompt=prompt, **self.processor.tokenizer.special_tokens_map,
        )  # fmt: skip
        rendered, found = made
        spans = [(start, stop) for start, stop in found[0] if stop > start]
        num_answers = sum(message["role"] == "assistant" for message in messages)
        return spans if rendered[0] == text and len(spans) >= num_answers else []

    def _header_spans(self, text: str, messages: list[dict[str, Any]], turns: list[int], prompt: bool) -> list[Span]:
        """The answers that stand between a header (and blanks) and the end token as they are; empty if one does not.

        This saves the second rendering of most conversations.
        """
        pieces = text.split(self.header) if self.header and self.end else []
        if len(pieces) != len(turns) + 1 + prompt or any(messages[turn].get("tool_calls") for turn in turns):
            return []
        spans, start = [], len(pieces[0])
        for turn, piece in zip(turns, pieces[1:], strict=False):
            start += len(self.header)
            content = content_text(messages[turn]["content"])
            blank = len(piece) - len(piece.lstrip())  # that a template writes behind the header: the model learns it
            found = [
                at + len(form)
                for at in (0, blank)
                for form in (content, content.strip())
                if piece.startswith(form + self.end, at)
            ]
            if not found:
                return []
            spans.append((start, start + found[0]))
            start += len(piece)
        return spans

    def _word_spans(
        self, text: str, messages: list[dict[str, Any]], turns: list[int], tools: Any, prompt: bool
    ) -> list[Span]:
        """The answers, found by rendering the conversation with a word in place of each."""
        word = _WORD
        while word in text:
            word += "q"
        words = [f"{word}{'x' * number}k" for number in range(len(turns))]
        changed = list(messages)
        for turn, word in zip(turns, words, strict=True):
            changed[turn] = self._replaced(messages[turn], word)
        rendered = self.render(changed, tools, prompt)
        lost = [turn for turn, word in zip(turns, words, strict=True) if rendered.count(word) != 1]
        if lost and (self.learn_from == "all" or turns[-1] in lost):
            advice = "" if turns[-1] in lost else "; set learn_from to 'last'"
            raise BadRow(f"the chat template does not render the answer of turn {lost[0]}{advice}")
        kept = [(turn, word) for turn, word in zip(turns, words, strict=True) if turn not in lost]
        fixed, rest = [], rendered
        for _, word in kept:
            piece, _, rest = rest.partition(word)
            fixed.append(piece)
        fixed.append(rest)
        answers = [replaced_text(messages[turn]) for turn, _ in kept]
        spans = aligned(text, fixed, answers)
        if spans is None:
            raise BadRow("the chat template rewrites the answers: where they are in the text cannot be told")
        learned = []
        for (turn, _), (start, stop), piece in zip(kept, spans, fixed, strict=False):
            if self.header and (found := piece.rfind(self.header)) >= 0:
                start -= len(piece) - found - len(self.header)  # what the model writes itself, such as a line break
            if messages[turn].get("tool_calls") and self.end and (found := text.find(self.end, stop)) >= 0:
                stop = found
            learned.append((start, stop))
        return learned

    def _replaced(self, message: dict[str, Any], word: str) -> dict[str, Any]:
        """A message with a word in place of its content, or of its first tool's name if it has no content."""
        if not message.get("tool_calls") or content_text(message["content"]):
            return message | {"content": self._content(word, message["role"])}
        first, *others = message["tool_calls"]
        if "function" in first:
            return message | {"tool_calls": [first | {"function": first["function"] | {"name": word}}, *others]}
        return message | {"tool_calls": [first | {"name": word}, *others]}

    def _content(self, content: str, role: str) -> str | list[dict[str, str]]:
        if not self._takes_parts(role):
            if role == "assistant":
                return content
            for kind, marker in MARKERS.items():
                content = content.replace(marker, getattr(self.processor, f"{kind}_token", None) or marker)
            return content
        if role == "assistant":
            return [{"type": "text", "text": content}] if content else []
        parts: list[dict[str, str]] = []
        pieces = re.split("|".join(f"({re.escape(marker)})" for marker in MARKERS.values()), content)
        pieces = [piece for piece in pieces if piece is not None]
        for piece in pieces:
            medium = next((kind for kind, marker in MARKERS.items() if piece == marker), None)
            # Templates add their own separators around media; line breaks beside a marker would double them.
            text = piece.strip() if len(pieces) > 1 else piece
            parts += [{"type": medium}] if medium else [{"type": "text", "text": text}] if text else []
        return parts

    def _takes_parts(self, role: str) -> bool:
        """Whether the template reads the content of this role as a list of parts rather than as a string."""
        if role not in self._parts:
            before = {"assistant": ["user"], "tool": ["user", "assistant"]}.get(role, [])
            after = ["user"] if role == "system" else []
            turns = [{"role": other, "content": self._content("?", other)} for other in before]
            turns.append({"role": role, "content": [{"type": "text", "text": _WORD}]})
            turns += [{"role": other, "content": self._content("?", other)} for other in after]
            try:
                text = self.render(turns)
            except BadRow:  # most often string + list
                text = ""
            self._parts[role] = _WORD in text and "'type'" not in text and '"type"' not in text
        return self._parts[role]

    def _header(self) -> str:
        """Text that the template writes to start an answer."""
        turns = [{"role": "user", "content": self._content(_WORD, "user")}]
        try:
            plain, started = self.render(turns), self.render(turns, prompt=True)
        except BadRow as bad:
            raise ValueError(
                f"The chat template of {self.name} renders no question ({bad}); set that of its family."
            ) from None
        if _WORD not in plain:
            raise ValueError(f"The chat template of {self.name} does not render user turns; set that of its family.")
        return started[len(commonprefix([plain, started])) :]

    def _end(self) -> str:
        """Text after an answer, without blanks behind it."""
        turns = [{"role": role, "content": self._content(_WORD, role)} for role in ("user", "assistant")]
        try:
            text = self.render(turns)
        except BadRow as bad:
            raise ValueError(
                f"The chat template of {self.name} renders no answer ({bad}); set that of its family."
            ) from None
        if text.count(_WORD) != 2:
            raise ValueError(
                f"The chat template of {self.name} does not render answers, so nothing can be learned; set another."
            )
        return text.rpartition(_WORD)[2].rstrip()
