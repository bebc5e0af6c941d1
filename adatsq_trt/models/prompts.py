"""Prompt encoders: from a prompt to the tensors that condition a model, by a table of classes or a text encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adatsq_trt.errors import UserError


class PromptEncoder(nn.Module, ABC):
    """Encodes the prompts of a closed set.

    Attributes:
        prompts: all that can be asked for; elsewhere a prompt is its index in here.
        text_tokens: tokens of an encoded prompt.
        width: of a token.
        image_inputs: graph inputs of the image that goes with each prompt; none for models of text alone.
        negatives: encodings of the empty prompt: one, or one for each prompt, with its image.
    """

    image_inputs: tuple[str, ...] = ()
    negatives: int = 1
    prompts: tuple[str, ...]
    text_tokens: int
    width: int

    @abstractmethod
    def encode(self, prompts: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        """Tokens [B, text_tokens, width] and their pooled projection [B, width]; None is the empty prompt.

        A token of zeros stands for none: short prompts are filled up with them.
        """

    def encode_negative(self, prompts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The empty prompt, as it goes with each of these; as `encode`."""
        return self.encode([None] * len(prompts))

    def images(self, prompts: Sequence[int]) -> dict[str, Tensor]:
        """Graph input → [B, ...] float32, of the image that goes with each prompt; empty for models of text alone."""
        return {}


class ClassEncoder(PromptEncoder):
    """One token per class, which is the pooled projection too."""

    def __init__(self, embedding: nn.Embedding) -> None:
        """Take an embedding [classes + 1, width] with the empty prompt last."""
        super().__init__()
        self.embedding = embedding
        self.prompts = tuple(map(str, range(embedding.num_embeddings - 1)))
        self.text_tokens, self.width = 1, embedding.embedding_dim

    def encode(self, prompts: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        """Rows of the table."""
        rows = self.embedding(torch.tensor([len(self.prompts) if p is None else p for p in prompts]))
        return rows[:, None], rows


class StoredPrompts(PromptEncoder):
    """Prompts that were encoded before, by text encoders that are no longer in memory."""

    def __init__(
        self, prompts: Sequence[str], tokens: Tensor, pooled: Tensor, images: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take the encodings in whichever type they were stored; they become float32 where they are used.

        Args:
            prompts: their texts.
            tokens: [prompts + 1, text_tokens, width], the empty prompt last; or [2 * prompts, ...] where it was
                encoded with the image of each prompt.
            pooled: [prompts + 1 or 2 * prompts, width of the pooled projection].
            images: graph input → [prompts, ...], of the image that goes with each prompt.
        """
        super().__init__()
        self.prompts, self._tokens, self._pooled = tuple(prompts), tokens, pooled
        self._images = dict(images or {})
        self.image_inputs = tuple(self._images)
        self.text_tokens, self.width = tokens.shape[1:]
        self.negatives = len(tokens) - len(self.prompts)

    def encode(self, prompts: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        """The stored rows."""
        return self._rows([len(self.prompts) if p is None else p for p in prompts])

    def encode_negative(self, prompts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The stored rows: one for all, or each prompt's own."""
        return self._rows([len(self.prompts) + (p if self.negatives > 1 else 0) for p in prompts])

    def _rows(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(indices)
        return self._tokens[rows].float(), self._pooled[rows].float()

    def images(self, prompts: Sequence[int]) -> dict[str, Tensor]:
        """The stored rows."""
        return {name: values[torch.tensor(prompts)].float() for name, values in self._images.items()}


class TextEncoder(PromptEncoder):
    """Word and place embeddings and one transformer layer; the mean over the words is the pooled projection."""

    def __init__(self, words: Sequence[str], prompts: Sequence[str], text_tokens: int, width: int) -> None:
        """Make an untrained encoder.

        Args:
            words: the vocabulary; word 0 is the empty one, which fills short prompts up.
            prompts: sentences of these words.
            text_tokens: most words of a sentence.
            width: of a token, a multiple of 16.
        """
        super().__init__()
        self.vocabulary, self.prompts, self.text_tokens, self.width = tuple(words), tuple(prompts), text_tokens, width
        self.words = nn.Embedding(len(words), width)
        self.places = nn.Embedding(text_tokens, width)
        self.layer = nn.TransformerEncoderLayer(
            width, width // 16, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Indices into the vocabulary, int64 [B, text_tokens] → tokens [B, text_tokens, width], pooled [B, width]."""
        encoded = self.norm(self.layer(self.words(words) + self.places.weight))
        return encoded, encoded.mean(1)

    def encode(self, prompts: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        """The sentences' words, encoded."""
        sentences = ["" if prompt is None else self.prompts[prompt] for prompt in prompts]
        encoded: tuple[Tensor, Tensor] = self(self.word_indices(sentences))
        return encoded

    def word_indices(self, sentences: Sequence[str]) -> Tensor:
        """Indices into the vocabulary, int64 [B, text_tokens].

        Raises:
            UserError: a word that is not in the vocabulary, or too many words.
        """
        return torch.tensor([self._indices(sentence) for sentence in sentences])

    def _indices(self, sentence: str) -> list[int]:
        words = sentence.split()
        unknown = [word for word in words if word not in self.vocabulary]
        if unknown:
            known = " ".join(self.vocabulary[1:])
            raise UserError(f"prompt '{sentence}': unknown word '{unknown[0]}', expected words of: {known}")
        if len(words) > self.text_tokens:
            raise UserError(f"prompt '{sentence}': got {len(words)} words, expected at most {self.text_tokens}")
        return [self.vocabulary.index(word) for word in words] + [0] * (self.text_tokens - len(words))
