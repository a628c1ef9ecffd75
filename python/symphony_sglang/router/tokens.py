"""Token ids and page hashes of a request, as its worker will have them.

Everything here runs in a worker thread. What a session's last prompt gave is kept: of the next one
only what comes after the last special token of the common head is tokenized, and only new pages
are hashed. A wrong guess costs a cache hit, never an answer.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np

from symphony_sglang.core.page_hash import PageChain
from symphony_sglang.core.prefix import NO_NAMESPACE, TOKEN_BYTES, Namespace, pack_tokens
from symphony_sglang.core.routing_types import EventHashes
from symphony_sglang.router.chat import ChatTemplate, ConversationError

logger = logging.getLogger(__name__)

# About what natural text has; only where no tokenizer is at hand.
BYTES_PER_TOKEN = 4
CACHE_BYTES_MAX = 256 << 20
CACHE_ENTRIES_MAX = 65_536
IDS = msgspec.json.Decoder(list[int])
BATCHED_IDS = msgspec.json.Decoder(list[list[int]])
# Without a session id the head of a prompt says which conversation it goes on.
HEAD_CHARACTERS = 512


class Prompt(NamedTuple):
    """A prompt before tokenization: exactly one of the three is set. Raw JSON values."""

    text: str | None = None
    input_ids: list[int] | None = None
    chat: Mapping[str, Any] | None = None  # messages, tools, chat_template_kwargs …


class Tokens(NamedTuple):
    """A prompt's `length` in tokens, and its `page_hashes` by page size.

    Not `exact`: the hashes are of text (``text_pages``), and the length is an estimate.
    `token_bytes` are the ids as int32, where they are known.
    """

    length: int
    page_hashes: Mapping[int, EventHashes]
    exact: bool = True
    token_bytes: bytes = b""


NO_TOKENS = Tokens(0, {})


@dataclass(slots=True)
class Conversation:
    """What is kept of a session's last prompt."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    text: str = ""
    token_bytes: bytes = b""
    # The head that may be kept when the prompt goes on: it ends before a special token.
    cut_characters: int = 0
    cut_tokens: int = 0
    chains: dict[int, PageChain] = field(default_factory=dict)
    cost_bytes: int = 0

    def measure(self) -> int:
        chains = sum(chain.cost_bytes for chain in self.chains.values())
        return 512 + len(self.text) + len(self.token_bytes) + chains


class PromptTokens:
    """Tokenizes and hashes prompts; thread-safe.

    `tokenizer` is a Hugging Face tokenizer, or None: then only prompts given as ids are hashed.
    """

    def __init__(
        self,
        tokenizer: Any | None = None,
        template: ChatTemplate | None = None,
        *,
        cache_bytes_max: int = CACHE_BYTES_MAX,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._cache_bytes_max = cache_bytes_max
        self._cache: OrderedDict[tuple[str, Namespace], Conversation] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self._specials: dict[str, int] = {}
        if tokenizer is not None:
            self._specials = hard_boundaries(tokenizer)

    @property
    def knows_text(self) -> bool:
        return self._tokenizer is not None

    def tokens(
        self,
        prompt: Prompt,
        page_sizes: Iterable[int],
        session: str | None = None,
        namespace: Namespace = NO_NAMESPACE,
    ) -> Tokens:
        """The prompt's length and the event hashes of its whole pages.

        `NO_TOKENS` where the prompt cannot be tokenized here.
        """
        text, special = prompt.text, True
        if prompt.chat is not None:
            if self._template is None:
                return NO_TOKENS
            try:
                text, special = self._template.render(prompt.chat), False
            except ConversationError as error:
                logger.debug("chat template: %s", error)
                return NO_TOKENS
        if text is None and prompt.input_ids is None:
            return NO_TOKENS
        if text is not None and self._tokenizer is None:
            return NO_TOKENS
        conversation = self._conversation(session, namespace, text, prompt.input_ids)
        with conversation.lock:
            if text is not None:
                token_bytes = self._encode(conversation, text, special=special)
            else:
                assert prompt.input_ids is not None
                token_bytes = pack_tokens(prompt.input_ids)
                conversation.text, conversation.token_bytes = "", token_bytes
                conversation.cut_characters = 0
            hashes = {
                size: self._chain(conversation, size, namespace).update(token_bytes)
                for size in set(page_sizes)
                if size > 0
            }
        self._account((session or "", namespace), conversation, text, prompt.input_ids)
        return Tokens(len(token_bytes) // TOKEN_BYTES, hashes, token_bytes=token_bytes)

    def forget(self, session: str, namespace: Namespace = NO_NAMESPACE) -> None:
        with self._lock:
            found = self._cache.pop((session, namespace), None)
            if found is not None:
                self._cached_bytes -= found.cost_bytes

    def known(
        self, session: str, page_sizes: Iterable[int], namespace: Namespace = NO_NAMESPACE
    ) -> Tokens:
        """What the session's last prompt gave; `NO_TOKENS` where nothing is kept."""
        with self._lock:
            found = self._cache.get((session, namespace))
        if found is None:
            return NO_TOKENS
        with found.lock:
            token_bytes = found.token_bytes
            if not token_bytes:
                return NO_TOKENS
            hashes = {
                size: self._chain(found, size, namespace).update(token_bytes)
                for size in set(page_sizes)
                if size > 0
            }
        return Tokens(len(token_bytes) // TOKEN_BYTES, hashes, token_bytes=token_bytes)

    # The cache --------------------------------------------------------------------------------

    @staticmethod
    def _key(
        session: str | None, namespace: Namespace, text: str | None, ids: list[int] | None
    ) -> tuple[str, Namespace]:
        if session is not None:
            return session, namespace
        head = text[:HEAD_CHARACTERS] if text is not None else str((ids or [])[:HEAD_CHARACTERS])
        return "\x00head\x00" + head, namespace

    def _conversation(
        self, session: str | None, namespace: Namespace, text: str | None, ids: list[int] | None
    ) -> Conversation:
        key = self._key(session, namespace, text, ids)
        with self._lock:
            found = self._cache.get(key)
            if found is None:
                found = self._cache[key] = Conversation()
            self._cache.move_to_end(key)
            return found

    def _account(
        self,
        key: tuple[str, Namespace],
        conversation: Conversation,
        text: str | None,
        ids: list[int] | None,
    ) -> None:
        """Note what the conversation costs now, and let the oldest go where there is too much."""
        real_key = self._key(key[0] or None, key[1], text, ids)
        with self._lock:
            if self._cache.get(real_key) is conversation:
                cost = conversation.measure()
                self._cached_bytes += cost - conversation.cost_bytes
                conversation.cost_bytes = cost
            while self._cache and (
                self._cached_bytes > self._cache_bytes_max or len(self._cache) > CACHE_ENTRIES_MAX
            ):
                _key, oldest = self._cache.popitem(last=False)
                self._cached_bytes -= oldest.cost_bytes

    @staticmethod
    def _chain(conversation: Conversation, page_size: int, namespace: Namespace) -> PageChain:
        chain = conversation.chains.get(page_size)
        if chain is None:
            chain = conversation.chains[page_size] = PageChain(page_size, namespace)
        return chain

    # Tokenization -----------------------------------------------------------------------------

    def _encode(self, conversation: Conversation, text: str, *, special: bool) -> bytes:
        """Token ids of `text` as little-endian int32, from the kept head where it still holds."""
        cut = conversation.cut_characters
        if cut and conversation.text[:cut] == text[:cut]:
            head = conversation.token_bytes[: conversation.cut_tokens * TOKEN_BYTES]
            token_bytes = head + pack_tokens(self._ids(text[cut:], special=False))
        else:
            token_bytes = pack_tokens(self._ids(text, special=special))
        conversation.text, conversation.token_bytes = text, token_bytes
        conversation.cut_characters, conversation.cut_tokens = self._find_cut(text, token_bytes)
        return token_bytes

    def _ids(self, text: str, *, special: bool) -> list[int]:
        assert self._tokenizer is not None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
        return ids

    def _find_cut(self, text: str, token_bytes: bytes) -> tuple[int, int]:
        """Where the last special token begins, in characters and in tokens; (0, 0): nowhere."""
        characters, token = max(
            ((text.rfind(name), number) for name, number in self._specials.items()),
            default=(-1, -1),
        )
        if characters <= 0:
            return 0, 0
        places = np.flatnonzero(np.frombuffer(token_bytes, dtype="<i4") == token)
        return (characters, int(places[-1])) if places.size else (0, 0)

    def check(self) -> None:
        with self._lock:
            assert len(self._cache) <= CACHE_ENTRIES_MAX
            assert self._cached_bytes == sum(c.cost_bytes for c in self._cache.values())


def hard_boundaries(tokenizer: Any) -> dict[str, int]:
    """Special tokens (text -> id) before which a text may be cut without changing its ids.

    Such a token is matched before anything else, takes no blanks beside it, and nothing is put at
    a text's end. Tried out on a sample: a tokenizer that disagrees gives none.
    """
    backend = getattr(tokenizer, "added_tokens_decoder", {})
    found = {
        str(added.content): int(number)
        for number, added in backend.items()
        if added.special and not (added.lstrip or added.rstrip or added.single_word)
        and len(str(added.content)) > 1
    }  # fmt: skip
    sample = "Some text, 12 + 34 = 46.\nAnother line"
    kept: dict[str, int] = {}
    # Reserved tokens come by the hundred, and are in nobody's prompts.
    for text, number in list(found.items())[:64]:
        whole = sample + text + sample
        tail = tokenizer.encode(text + sample, add_special_tokens=False)
        try:
            ids = tokenizer.encode(whole, add_special_tokens=True)
            place = len(ids) - 1 - ids[::-1].index(number)
        except ValueError:
            continue
        if ids[place:] == tail:
            kept[text] = number
    return kept


def decode_ids(raw: bytes) -> list[int] | None:
    """Token ids of a request, the first of a batch; None where they are not that."""
    if raw[:1] != b"[":
        return None
    batch = raw[1:64].lstrip()[:1] == b"["
    try:
        if batch:
            return next(iter(BATCHED_IDS.decode(raw)), None) or None
        return IDS.decode(raw) or None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
