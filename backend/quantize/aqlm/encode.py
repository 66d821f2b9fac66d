"""The best sums of codewords, one of each codebook, for the groups of one place."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from backend.quantize.aqlm.nearest import distance_table, least_distance, nearest, ranked

SPREAD = 2  # ways in which a path goes on in the codebooks between the first and the last


class Encoder:
    """Codebooks as several places of a row see them: whitened by the place's own metric.

    Args:
        codebooks: C, (K, M, G).
        whiten: A matrix per place, (n, G, G); errors e of place j cost ||e whiten_j||^2.
        candidates: A, words of the first codebook that are tried; a power of two.
    """

    def __init__(self, codebooks: Tensor, whiten: Tensor, candidates: int) -> None:
        K, M, G = codebooks.shape  # noqa: N806
        words = (codebooks.view(1, K * M, G) @ whiten).view(-1, K, M, G)
        self._tables = [tables.unbind() for tables in distance_table(words).unbind()]  # n times K times (M, G + 1)
        # Added to a point with a one at its end, a negative word is taken from the point and leaves the one.
        self._negative = [words.unbind() for words in F.pad(words.neg_(), (0, 1)).unbind()]
        self._candidates = min(candidates, M)

    def encode(self, x: Tensor, place: int, keep: int = 1) -> tuple[list[Tensor], Tensor]:
        """Best sums of codewords, best first.

        For one codebook they are the nearest words. For two, each of the A candidates of the first gets its nearest
        partner. With more, A paths go from codebook to codebook.

        Args:
            x: Whitened targets with a one at their end, (G + 1, N).
            place: Which of the n places they belong to.
            keep: How many sums per target, at most A.

        Returns:
            Codes of each codebook, int32, (keep, N), and the whitened errors that they leave, (keep, N, G).
        """
        tables, words, points = self._tables[place], self._negative[place], x.T
        last = len(words) - 1
        errors, found = nearest(tables[0], x, keep if last == 0 and keep == 1 else self._candidates)
        if last == 0:
            if len(found) > keep or keep > 1:
                found = found.gather(0, ranked(errors, keep)[1])
            return [found], F.embedding(found, words[0]).add_(points)[..., :-1]
        codes = [found]  # of each codebook, (paths, N)
        rest = F.embedding(found, words[0]).add_(points)  # (paths, N, G + 1)
        for k in range(1, last):
            errors, codes, rest = self._extend(errors, codes, rest, tables[k], words[k])
        # Which partner the losers have does not matter: only the distance is computed for all.
        errors += least_distance(tables[last], rest.view(-1, len(x)).T).view_as(errors)
        chosen = ranked(errors, keep)[1]
        codes = [code.gather(0, chosen) for code in codes]
        if last == 1:  # cheaper than picking rows of `rest`
            rest = F.embedding(codes[0], words[0]).add_(points)
        else:
            rest = rest.gather(0, chosen.unsqueeze(2).expand(-1, -1, len(x)))
        found = nearest(tables[last], rest.view(-1, len(x)).T)[1].view(keep, -1)
        codes.append(found)
        return codes, rest.add_(F.embedding(found, words[last]))[..., :-1]

    def sums(self, codes: list[Tensor], place: int) -> Tensor:
        """Negative whitened sums of codewords: codes of each codebook, (N,) -> (N, G)."""
        words = self._negative[place]
        total = F.embedding(codes[0], words[0])
        for k in range(1, len(words)):
            total += F.embedding(codes[k], words[k])
        return total[:, :-1]

    def _extend(
        self, errors: Tensor, codes: list[Tensor], rest: Tensor, table: Tensor, words: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Take a word of one more codebook: each path goes on in its best ways, the best A of all remain."""
        paths, N, width = rest.shape  # noqa: N806
        ways = min(SPREAD, len(words))
        gains, found = nearest(table, rest.view(-1, width).T, ways)  # (ways, paths * N)
        errors = (errors + gains.view(ways, paths, N)).flatten(0, 1)
        errors, chosen = ranked(errors, min(self._candidates, ways * paths))
        found = found.view(ways * paths, N).gather(0, chosen)
        parent = chosen % paths
        codes = [code.gather(0, parent) for code in codes]
        rest = rest.gather(0, parent.unsqueeze(2).expand(-1, -1, width)).add_(F.embedding(found, words))
        return errors, [*codes, found], rest
