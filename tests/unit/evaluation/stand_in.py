"""Models whose every probability is known, on one letter a token."""

import torch

END = 0
LETTERS = "\n !\"%&'()*,-./0123456789:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
VOCABULARY = len(LETTERS) + 2  # END, each letter, and one for every other letter


class Uniform:
    """All tokens are equally likely."""

    context, vocabulary, end_of_document = 512, VOCABULARY, END

    def __init__(self):
        self.facts = {"parameters": 0, "dtype": "float32"}
        self.shapes = []

    def encode(self, text):
        return [LETTERS.find(letter) + 1 or VOCABULARY - 1 for letter in text]

    def logits(self, tokens_BT):
        self.shapes.append(tuple(tokens_BT.shape))
        return torch.zeros(*tokens_BT.shape, VOCABULARY)


class Bigram(Uniform):
    """The next token's logits are a row of `table_VV`; `reads` holds what it was asked, row by row."""

    def __init__(self, seed=0, context=512):
        super().__init__()
        self.context = context
        self.table_VV = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))

    def logits(self, tokens_BT):
        super().logits(tokens_BT)
        return self.table_VV[tokens_BT]

    def expected(self, text, before):
        """Log-likelihood of `text` after token `before`, and whether each of its letters is the likeliest, by hand."""
        total, greedy = 0.0, True
        for token in self.encode(text):
            row_V = self.table_VV[before].double()
            total += float(row_V[token] - row_V.exp().sum().log())
            greedy &= bool(row_V[token] == row_V.max())
            before = token
        return total, greedy


class Cumulative(Bigram):
    """Its logits depend on every token it was given, so that it shows what a window holds."""

    def logits(self, tokens_BT):
        Uniform.logits(self, tokens_BT)
        weights_BT = (tokens_BT + 1).cumsum(dim=1) % VOCABULARY
        return self.table_VV[weights_BT]
