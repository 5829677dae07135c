"""Text as tokens come: whole characters, and stop strings over the borders of tokens."""

from moe_lab.infer.text import TextStream

PIECES = [b"", b"ab", b"c", b"d\n", b"\n", b"\xc3", b"\xa9", b" x"]


def decode(tokens):
  return b"".join(PIECES[t] for t in tokens).decode("utf-8", errors="replace")


def test_text_comes_at_once_without_stop_strings():
  stream = TextStream(decode, prompt=[1, 2, 1, 2, 1])
  assert [stream.push(t) for t in (1, 2, 3)] == ["ab", "c", "d\n"] and stream.text == "abcd\n"


def test_a_character_comes_whole():
  stream = TextStream(decode)
  assert [stream.push(t) for t in (5, 6, 7)] == ["", "é", " x"]


def test_a_stop_string_over_three_tokens():
  stream = TextStream(decode, stop=("zzz", "bcd\n\n"))
  # "ab" may begin the stop string with its b, and so on.
  assert [stream.push(t) for t in (1, 2, 3, 4)] == ["a", "", "", ""]
  assert stream.stopped and stream.text == "a" and stream.finish() == ""


def test_what_turns_out_otherwise_is_given_back():
  stream = TextStream(decode, stop=("bcd\n\n",))
  assert [stream.push(t) for t in (1, 2, 3, 7)] == ["a", "", "", "bcd\n x"]
  assert stream.push(1) == "a" and stream.finish() == "b" and not stream.stopped


def test_the_first_of_several_stops_counts():
  stream = TextStream(decode, stop=("d", "c"))
  stream.push(1)
  assert stream.push(2) == "" and stream.text == "ab" and stream.stopped
