"""Conversations as documents: JSON lines of messages, a template, and which of the tokens a model is to learn."""

import json
from typing import NamedTuple

import numpy as np

from moe_lab.data.formats import Document, FoundFile, JsonlFiles
from moe_lab.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
TURN = "<{role}>\n"  # before each message; a line end behind those that are not answers
FIELD = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


class Part(NamedTuple):
  """A stretch of a conversation; the tokens of an answer count, and after it the end token."""

  text: str
  counted: bool


class Conversation(NamedTuple):
  """A document in parts; has what a `Document` has."""

  name: str
  parts: tuple[Part, ...]

  @property
  def text(self) -> str:
    return "".join(part.text for part in self.parts)


def templated(messages: list[dict]) -> tuple[Part, ...]:
  """Returns a conversation's parts: "<user>", its text, "<assistant>", and what counts, the assistant's text."""
  parts = []
  for message in messages:
    head, answer = TURN.format(role=message["role"]), message["role"] == "assistant"
    parts += [Part(head, False), Part(message["content"], True)] if answer else []
    parts += [] if answer else [Part(f"{head}{message['content']}\n", False)]
  return tuple(parts)


def ids_of(document: Document | Conversation, tokenizer: Tokenizer) -> np.ndarray:
  """Returns the ids of a document, begin and end included; those that do not count are stored as ~id, below zero.

  Parts are tokenised one by one, as a prompt is that is to be answered.
  """
  parts = getattr(document, "parts", None)
  if parts is None:
    return np.concatenate([[tokenizer.bos_id], tokenizer.encode(document.text), [tokenizer.eos_id]]).astype(np.int32)
  pieces = [[~tokenizer.bos_id]]
  for part in parts:
    ids = tokenizer.encode(part.text).astype(np.int32)
    pieces += [ids, [tokenizer.eos_id]] if part.counted else [~ids]
  return np.concatenate(pieces).astype(np.int32)


def ids_and_counted(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns int32 ids and a bool for each, of what `ids_of` has put into one array."""
  counted = stored >= 0
  return np.where(counted, stored, ~stored).astype(np.int32), counted


class ChatFiles(JsonlFiles):
  """A conversation a line: its "messages", of which at least one is the assistant's. Blank lines are passed over."""

  wanted = f"a JSON object with messages on each line, as in {FIELD}"

  def _read(self, file: FoundFile, place) -> Conversation:
    document = super()._read(file, place)
    return Conversation(document.name, templated(json.loads(document.text)))

  def _field(self, value: dict) -> tuple[str | None, str]:
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
      return None, 'has no list of "messages"'
    for number, message in enumerate(messages, 1):
      if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        return None, f'message {number} has no string "content"'
      if message.get("role") not in ROLES:
        return None, f"message {number} has the role {message.get('role')!r}, not one of {', '.join(ROLES)}"
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
      return None, "has no answer of the assistant's"
    # As text: what the characters are is looked at there.
    return json.dumps([{"role": m["role"], "content": m["content"]} for m in messages], ensure_ascii=False), ""
