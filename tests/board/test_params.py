import struct

from kvm2.board.params import Params


def test_the_block_is_the_table_in_the_guide():
    block = Params(
        ipa_bits=36,
        host_ipa_bits=48,
        page_shift=14,
        cpus=3,
        ranges=((1 << 30, 1 << 26), (1 << 35, 1 << 16)),
        sve_vls=0b1011,
        top=((1 << 36) - 65536, 65536),
    ).pack()
    assert block[:8] == b"KVM2PARM"
    assert struct.unpack_from("<IIIIII", block, 8) == (1, len(block), 36, 48, 14, 3)
    assert struct.unpack_from("<QQQQ", block, 32) == (0b1011, 0x09000000, (1 << 36) - 65536, 65536)
    assert struct.unpack_from("<II", block, 64) == (2, 0)
    assert struct.unpack_from("<4Q", block, 72) == (1 << 30, 1 << 26, 1 << 35, 1 << 16)
    assert len(block) == 72 + 2 * 16
