"""Variance of the teacher's features that the codes explain."""

import numpy as np
from scipy import linalg, sparse


RIDGE = 1.0  # for codes: as if each code had been seen once more, with the mean feature


def codes_explained_variance(
    codes: np.ndarray, teacher: np.ndarray, real: np.ndarray | None = None, ridge: float = RIDGE
) -> list[float]:
    """Share of the teacher's variance that a linear map of the one-hot codes explains (R^2).

    Fitted on the clips of even number, measured on the others. 1 - the squared error over the squared distance from
    the mean, both summed over all dimensions; below 0 where the codes mislead.

    Args:
        codes: (clips, patches, codebooks), integers from 0.
        teacher: (clips, patches, dim), the teacher's features.
        real: (clips, patches), which patches are not padding; all if absent.
        ridge: penalty, in patches.

    Returns:
        The share for the codes of level 1, of levels 1 and 2, and so on; the last is that of all levels.

    Raises:
        ValueError: shapes that do not fit, or fewer than 2 clips.
    """
    codes, teacher = np.asarray(codes), np.asarray(teacher, dtype=np.float64)
    real = np.ones(codes.shape[:2], dtype=bool) if real is None else np.asarray(real, dtype=bool)
    if len(codes) < 2 or not codes.shape[:2] == teacher.shape[:2] == real.shape:
        raise ValueError(
            f"codes {codes.shape}, teacher {teacher.shape} and real {real.shape} must share (clips, patches), with at "
            "least 2 clips"
        )
    codebook_size = int(codes.max()) + 1
    (fit_codes, fit_teacher), (test_codes, test_teacher) = [
        (_one_hot_codes(codes[half][real[half]], codebook_size), teacher[half][real[half]])
        for half in (slice(0, None, 2), slice(1, None, 2))
    ]
    mean = fit_teacher.mean(axis=0)
    # The penalty draws the weights to 0, and so a code never seen to the mean: no intercept is needed beside it.
    gram = (fit_codes.T @ fit_codes).toarray() + ridge * np.eye(fit_codes.shape[1])
    moment = fit_codes.T @ (fit_teacher - mean)
    total = np.square(test_teacher - test_teacher.mean(axis=0)).sum()
    shares = []
    for size in range(codebook_size, gram.shape[0] + 1, codebook_size):
        weights = linalg.solve(gram[:size, :size], moment[:size], assume_a="pos")
        error = np.square(test_teacher - mean - test_codes[:, :size] @ weights).sum()
        shares.append(float(1.0 - error / total))
    return shares


def _one_hot_codes(codes: np.ndarray, codebook_size: int) -> sparse.csr_matrix:
    """(patches, codebooks) -> (patches, codebooks * codebook_size) of 0 and 1."""
    patches, levels = codes.shape
    columns = codes + codebook_size * np.arange(levels)
    starts = np.arange(patches + 1) * levels
    return sparse.csr_matrix((np.ones(columns.size), columns.ravel(), starts), shape=(patches, levels * codebook_size))
