"""Code cache: codes of a frozen tokenizer on disk, a record for each sample, made when it first comes."""

import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
import torch

from bridle_hf import BridleTokenizerModel


class CodeCache:
    """Codes of samples, in FOLDER/<hash of the tokenizer>.codes.

    Record i, of sample i of the data: 8 bytes of the fingerprint of the input that the codes are of (see
    [`MaskedLoader`]), codes (patches, num_codebooks, num_soft_codes), unsigned, in as few bytes each as the codebook's
    size takes, and 4 bytes of CRC-32. A record that is missing, torn by a kill, or of another input (another crop, a
    file that has changed, another list of files) is none, and is written anew. So the processes of a run need not know
    of each other, nor a run of the one that it resumes.

    Opening it removes the codes of other tokenizers: those of phases that are over.

    Args:
        folder: the run's own.
        tokenizer: frozen, on any device.
        precision: what it computes in, which may change codes.

    Raises:
        OSError: by any call: the file cannot be written or read.
    """

    def __init__(self, folder: Path, tokenizer: BridleTokenizerModel, precision: str):
        config = tokenizer.config
        self.shape = int(np.prod(config.patch_grid)), config.num_codebooks, config.num_soft_codes
        self.dtype = np.min_scalar_type(config.codebook_size - 1)
        self.record_size = 8 + int(np.prod(self.shape)) * self.dtype.itemsize + 4
        path = folder / f"{_hash(tokenizer, precision)}.codes"
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.glob("*.codes"):
            if other != path:
                other.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.file = os.fdopen(descriptor, "r+b", buffering=0)

    def read(self, indices: list[int], fingerprints: list[int]) -> torch.Tensor | None:
        """(samples, patches, num_codebooks, num_soft_codes) int64; `None` if the codes of one sample are missing."""
        found = []
        for index, fingerprint in zip(indices, fingerprints):
            record = os.pread(self.file.fileno(), self.record_size, index * self.record_size)
            body = record[:-4]
            if record[:8] != _bytes(fingerprint) or record[-4:] != _crc(body) or len(record) < self.record_size:
                return None
            found.append(np.frombuffer(body, self.dtype, offset=8).reshape(self.shape))
        return torch.from_numpy(np.stack(found).astype(np.int64))

    def write(self, indices: list[int], fingerprints: list[int], codes: torch.Tensor) -> None:
        """Keep codes (samples, patches, num_codebooks, num_soft_codes); the patches that cut inputs lack are 0."""
        records = np.zeros((len(codes), *self.shape), self.dtype)
        records[:, : codes.shape[1]] = codes.cpu().numpy()
        for index, fingerprint, record in zip(indices, fingerprints, records):
            body = _bytes(fingerprint) + record.tobytes()
            os.pwrite(self.file.fileno(), body + _crc(body), index * self.record_size)


def _bytes(fingerprint: int) -> bytes:
    return fingerprint.to_bytes(8, "little", signed=True)


def _crc(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(4, "little")


def _hash(tokenizer: BridleTokenizerModel, precision: str) -> str:
    """Of config, weights and codebooks."""
    hashes = hashlib.sha256(f"{tokenizer.config.to_json_string(use_diff=False)}{precision}".encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        hashes.update(name.encode())
        hashes.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return hashes.hexdigest()[:32]
