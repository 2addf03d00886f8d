"""One client's conversation: its history in the format that is asked for, and the request bodies made of it.

Not here: when they are sent (`runner`), what is said (`workload`).
"""

from typing import Any, Protocol

from baton.bench.args import MultiturnArgs
from baton.bench.client import Answer
from baton.bench.workload import Question


class TextCodec(Protocol):
    """What is needed of a tokenizer here."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str: ...


class Conversation:
    """Begins with its first question said."""

    def __init__(self, client: int, questions: list[Question], args: MultiturnArgs, codec: TextCodec) -> None:
        self.client = client
        self.round_idx = 0
        self.token_ids: list[int] = []
        self._text = ""
        self._messages: list[dict[str, str]] = []
        self._questions = questions
        self._args = args
        self._codec = codec
        self._say()

    @property
    def num_left(self) -> int:
        """Turns after the present one."""
        return len(self._questions) - self.round_idx - 1

    def generate_body(self) -> dict[str, Any]:
        prompt = {"input_ids": self.token_ids} if self._args.prompt_format == "ids" else {"text": self._text}
        return {
            **prompt,
            "sampling_params": {"temperature": 0.0, "max_new_tokens": self._output_len, "ignore_eos": True},
            "stream": True,
            "stream_options": {"include_usage": True},
            "lora_path": self._args.lora_path,
            "return_logprob": False,
            "logprob_start_len": -1,
        }

    def chat_body(self, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "messages": self._messages,
            "temperature": 0.0,
            "max_tokens": self._output_len,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def go_on(self, answer: Answer) -> None:
        """Add the answer and the next question."""
        self.end(answer)
        self.round_idx += 1
        self._say()

    def end(self, answer: Answer) -> None:
        """Add the answer."""
        if answer.output_ids is not None:
            self.token_ids += answer.output_ids
        else:
            self.token_ids += self._codec.encode(answer.text, add_special_tokens=False)
        self._text += answer.text
        self._messages.append({"role": "assistant", "content": answer.text})

    @property
    def _output_len(self) -> int:
        return self._questions[self.round_idx].output_len

    def _say(self) -> None:
        question = self._questions[self.round_idx]
        self.token_ids += question.token_ids
        if self._args.prompt_format == "text" or self._args.api_format == "openai":
            text = self._codec.decode(question.token_ids, skip_special_tokens=False)
            self._text += text
            self._messages.append({"role": "user", "content": text})
