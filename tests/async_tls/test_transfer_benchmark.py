"""The benchmark of transfers: small, so that it runs anywhere."""

import numpy as np
import pytest

from asa_jax.async_tls import transfer_benchmark
from tests.async_tls.gathers import can_gather


def test_the_table_has_both_back_ends_and_layouts(capsys):
    if not can_gather():
        pytest.skip("needs a compiler for the gather")
    sizes = ["--num_blocks=16", "--num_ctas=4,8", "--host_blocks=64", "--compute_size=32"]
    assert transfer_benchmark.main(sizes) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    assert cells[0] == list(transfer_benchmark.HEADER)
    back_ends = "host_thread", "ffi_gather, 4 CTAs", "ffi_gather, 8 CTAs"
    assert [(line[0], line[1], line[5]) for line in cells[2:]] == [
        (layout, name, what)
        for layout in ("gqa", "mla")
        for name in back_ends
        for what in ("matrices", "vectors")
    ]
    for line in cells[2:]:
        assert float(line[4]) > 0 and float(line[6]) > 0 and float(line[7]) > 0
    assert any(line.startswith("- device: ") for line in lines)


def test_a_back_end_that_brings_other_blocks_is_found(monkeypatch):
    numbers = np.arange(0, 16, 3)
    fetches = transfer_benchmark.HostThreadFetches((8, 2, 64, 4), numbers)
    fetches.host[:] = np.arange(16).reshape(8, 2, 1, 1)
    transfer_benchmark.check(fetches, numbers)
    bring = fetches._backend._bring
    monkeypatch.setattr(fetches._backend, "_bring", lambda rows, blocks: bring(rows, 1 - blocks))
    with pytest.raises(RuntimeError, match="are not those of the host"):
        transfer_benchmark.check(fetches, numbers)
    fetches.close()


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--num_blocks=0", "expected numbers with commas between"),
        ("--num_ctas=few", "expected numbers with commas between"),
        ("--host_blocks=1000", "not below --num_blocks"),
        ("--compute_size=0", "must be at least 1"),
    ],
)
def test_wrong_flags_are_refused(flag, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        transfer_benchmark.main([flag])
    assert message in capsys.readouterr().err
