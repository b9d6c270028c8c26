"""Settings of generation that a task asks for, as arguments of `generate`; what is not supported is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tpcompress.errors import did_you_mean

ALIASES = {"max_gen_toks": "max_new_tokens", "stop": "until", "stop_sequences": "until"}
"""Other names of settings."""

SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class GenerationSettings:
    """How answers of one group of requests are generated.

    Attributes:
        max_new_tokens: longest answer.
        until: texts at which an answer ends, and which are not part of it.
        do_sample: sample; without it, a temperature above 0 samples. A temperature of 0 is greedy in any case.
        temperature, top_p, top_k: of sampling.
        num_beams: beams of beam search.
        min_new_tokens, repetition_penalty, length_penalty, no_repeat_ngram_size: as in transformers.
        skip_special_tokens: leave special tokens out of the answer.
    """

    max_new_tokens: int = 1024
    until: tuple[str, ...] = ()
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    min_new_tokens: int | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    skip_special_tokens: bool = True

    @classmethod
    def of(
        cls, values: Mapping[str, Any] | None, *, max_new_tokens: int = 1024, ignore: Sequence[str] = ()
    ) -> GenerationSettings:
        """Read the settings of a task; None stands for a setting that is not given.

        Args:
            values: settings by name.
            max_new_tokens: longest answer where the task names none.
            ignore: unsupported settings that may be left out.

        Raises:
            ValueError: an unsupported setting, one given twice, or an impossible value.
        """
        known, found = [f.name for f in fields(cls)], dict[str, Any]()
        for given, value in (values or {}).items():
            name = ALIASES.get(given, given)
            if value is None or given in ignore:
                continue
            if name not in known:
                raise ValueError(
                    f"Generation setting {given}={value!r} is not supported; supported: {', '.join(known)}."
                    f"{did_you_mean(given, known)} To leave it out on purpose: ignore_gen_kwargs={given}."
                )
            if name in found and found[name] != value:
                raise ValueError(f"{name} is given twice, as {found[name]!r} and {value!r}; give one of them.")
            found[name] = value
        until = found.get("until", ())
        found["until"] = tuple(text for text in ((until,) if isinstance(until, str) else until) if text)
        found.setdefault("max_new_tokens", max_new_tokens)
        for name, least in (("max_new_tokens", 1), ("num_beams", 1)):
            value = found.get(name, least)
            if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
            found[name] = int(value)
        if not all(isinstance(text, str) for text in found["until"]):
            raise ValueError(f"until is a list of texts, got {until!r}.")
        return cls(**found)

    @property
    def samples(self) -> bool:
        """Whether answers are sampled."""
        if self.temperature == 0:
            return False
        return bool(self.temperature) if self.do_sample is None else self.do_sample

    def arguments(self) -> dict[str, Any]:
        """Arguments of `generate`, without `until`."""
        sampling = {name: getattr(self, name) for name in SAMPLING} if self.samples else {}
        names = ("min_new_tokens", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
        rest = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in {**sampling, **rest}.items() if value is not None}
        fixed = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams, "do_sample": self.samples}
        return {**fixed, **given}
