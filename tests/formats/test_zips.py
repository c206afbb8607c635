"""Zip archives: read as zipfile reads them, written byte for byte as PyTorch and NumPy do."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ema_cli.errors import DamagedFile, InputError, UnsupportedInput
from ema_cli.formats import zipdirectory, zips
from ema_cli.formats.zips import Archive, Laid, NewMember

few = settings(max_examples=40, deadline=None)
WHAT = "an archive for tests"


def unpacked(text: str) -> bytes:
    """Return what a golden text stands for."""
    return zlib.decompress(base64.b85decode(text.replace("\n", "")))


# torch.save of PyTorch 2.13.0: five dtypes, an empty tensor and a tied one.
TORCH_MODEL = r"""
c-pO2O>YxN7#@2Q+g<DgT0#R!p{2An6ddno912RhMSEE!j1kB}RF-3J;#JpPzxISGJt0*=LU3t+0Jk1{tJF)cm3ru<?WIz=A
t8F|g&)xQ*fl%r#8H5;)+?>&`IwpaeY{minnEa-Lt|qG9Yx)s?fOgYCT^DcU-`Cm7~M{cd+Amy@O`(1y`VRguMOJnz-?dgT3
7~jwg#zUJxj<o{Gf?771Avn3|gI1V+(u!P;Ly|^)1hDH?Z3q27|_3RR*cZAwx2=x#_|bhsZXixWOOFFkMfPIc3PyC30`|w;=
0C7;@Jg<VZX4mXq26`9X(TID{czgF>CIah(}aOql5qoleAU+5GW{ewNWIaJa*0kA$>uQ`&bp?NJPKH8@tECKJ6LHg$Mc;Jh0
2Hb;E(j8BE*obN=)w?O$8Ip2F2PS)U5eTv!)0w3NNEs{qgx(^tg2B$gQhaue=O7{_``xwI~H7M2#(e76ouHMx)dT@51Gtgu>
_fohNo`Za|hqwD~d*tC$=0S(^+{1;?Ly3A=;vUMOcR^nU1%p}xjqRM<?c;6G`BFRlR1Gi)C&FM-PQrR0mL17S-G>V2UBPg%2
A{F5!k*iPOP#`2sp@2NKQ1o(^e~MOy{dbb_8d~f(k^WTgKiTy?z)2^DPY?wjaB&Mp-|PI|9kQ+HBPU+Rp-%4q#EvNqv?B_y{
_BCwq+bpI2@)<4Xl0*|B@A>^h5)*==0FP`Zjh0+N!p7`PFoz;d>bSF7>c;`RVZtQOQj7kVk8=R9Pz9)}_}nz*+CDlCL%DqW{
Zp<vi1w?BZhFg<@MKdR2X*&6Iz5(Vsr>`qekHeqMSgtN_FuWOKjYd30@_72ae=rMM%_w$2^E5lW?~)USVk`5g^nX&<RC;!?V
8t-fCM5&a6={OvR8$D%&kU*C8G`g<?7Kw^fAjl$)~xSA$Y`+q#%yt#k>E+Rb&5axgA4m^?|-!$oeZ^LWbR{6loQB<>Hn9JIV
xnk<%qne6R)=kq~R*kYjel*L5ZYmY(^4PQIw~E9^k-1E<Qj2`XgLh`kx%eKD#Kz-uPQd+>M!N@fk|G{}^8&?n3GJD>NtSqo%
?d1kj#x&~nFPm^Coh0+O(7xklE`>+h{z`*Qb{7?9iGsf7LaNZ8E;q-`CLS5No2g$MC6T(fYc-8?yVRfe~CyVsTuE&f`DAhBC
*So(0I`<3efLI(B0dq>SQwK!?`D=3uD%!`_nLUE4e6oGxYrxEgX6o%~gk;Fu~;6d_MPo#ma?K
"""
# The same of an empty dict, to größe.pt.
TORCH_EMPTY = r"""
c-jl_W@cev;NW1u00Im`42ea_8JT6N`YDMeiFyUuIc`pT3{fbcfvL8TK`+3Yo#WF)rlV{?eIOiw(^PQ=Q@E*mY57IDi6!x6s
YS(^`FU<mhG>Qp0SrM_Z-0NMnGt9>BVMbe7|an?7nkH0C8npwC+1|P=jEp6mAE+>lWu!dl$i<00rusEFPVT=FyVE8AcH;J0Z
El5srf}IsYPy1*5ud=138%`B{``eH?-P5mLweh{0z2mH^9T)l6)5!bAjx>I4?bvu>a*4j1Un3N>cj8sYRK<7^q4t0lFhTGsV
qGk3^>!7+D%vn3!3ZnVXxN8Ce<`8yc7x7#JEDn^>A!m>L>dni^P|o0@==$uqX4r!|1?&;YxV5#(67JCReb0EWxa^8vbU<OC>
=qB9IhH(Gi}Hv~BmNud~W5!n!ol#6Z-azYS9F(-(T0W$%jYe$YteiZH3khJ6Q19A|{q1w&FKp^r1yxG`vU`d5p7p{{Hjh@U1
p?@$zXrMlJ5Z%oJ;X_IRRyK$pHn4h#S^%!x3WN
"""
# torch._C.PyTorchFileWriter, with 4 GiB and 5 bytes of zeros left out at offset 192.
TORCH_HUGE = r"""
c-obdzfQtH9LKM%l!h3@KQYn4$tWg@S7>WH7?puRmM$zhm;#M7HeyOcqPsi>i7|2a4U{)<*U1M_?%J!p(gV4KTnhbuKi@mPK
eH|@03b<VVimv&u)J2s>Dz~G%eP8*H*T$(2N%@p*sj|(>se{=QqVGE8Tyz^(>yq#Ob;P91|ba>d#hI6O<<S{p`V{duf&4v(;
^(v5o8WX;49S4fwr10L?4}Pt3v2a_J9sj=>|<NBl;yr=zIUAqocEqxCB-sNZ<B)PWKj3-Xe;CD3u(F|1rF7@S%>U;-@(;$1b
mV@7rCkZF|Ujlb`$kT*voa8)bMr{@xHnf;cn77TAe0l<*z)Y|pV==fU#FC%tmoD9|tpw9W`5Lmeu*X2^yP^|GdG6-|W@YO)S
x-GGW>lr=?GRh00306vQ$zZfOt@P(0#@d+qQq)v`fQjJRd6Rtd1izyokH9a$bg{S>UEd^Y<#h4!=um^znq?dQ94^`!49?~-&
_mkz5($=IADT|2f$TCVTXVQxNt3})@meuTznRQXzC+!ptBA0Ap&xHeaDnvT`(|IO%4!+BXfhLRJM@azq1=lDAQ2
"""
# numpy.savez of NumPy 2.4.6: a/b = arange(3), float32; ü = zeros((2, 0)); '' = float16(2).
NUMPY = r"""
c-jl_W@gc4fB;2?Z9Q$l|Dk}LL4+YuKS?jIppub6fT0Jf2u4r#3-t|%WMn8~s8&x&Elw^{w^C5INi$K`QBY6IFDfZY%!|)2N
=XHYyCvonrvk-`GZG6@fqV^P9ZemDS_KLK7sM3}_CUfR0OAP_h$j}#XgC4$1RKy3hxfqz&;WIN171I5S`g(2BOL_;%6!2UfD
-uisuy0t+|2@XH_X*dP!&!1L*9reS5q49ppXZKHzSiSGitKwfu;?11_Wqe1d-501lNQVO%2e<U_;S#6i7lM4c#J85H&%Af(1
oSEzl~64py*X%s@CBNSiW&cmOQim|X
"""


@contextlib.contextmanager
def opened(content: bytes) -> Iterator[int]:
    """Yield a descriptor of a file with this content."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        yield file.fileno()


def contents(raw: bytes) -> dict[str, bytes]:
    """Return what each member holds, everything checked."""
    with opened(raw) as fd:
        archive = zips.read_archive(fd, "x.zip", 0, len(raw), what=WHAT)
        return {
            member.name: zips.member_bytes(fd, "x.zip", member, 1 << 20)
            for member in archive.members
        }


def archive_of(raw: bytes) -> Archive:
    """Return the archive that is these bytes."""
    with opened(raw) as fd:
        return zips.read_archive(fd, "x.zip", 0, len(raw), what=WHAT)


def zipped(members: dict[str, bytes], method: int = 0, comment: bytes = b"") -> bytes:
    """Return an archive as zipfile makes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
        archive.comment = comment
    return buffer.getvalue()


def assembled(laid: Laid) -> bytearray:
    """Return the bytes of an archive, with zeros where data is missing."""
    image = bytearray(laid.total)
    for offset, data in laid.literals:
        image[offset : offset + len(data)] = data
    return image


def relaid(raw: bytes, holes: Callable[[str], bool], *, torch: bool) -> bytes:
    """Return what we write for the members of `raw`, some of them filled in as the engine does."""
    members, found = archive_of(raw).members, contents(raw)
    laid = zips.lay_out(
        [NewMember(m.name, None if holes(m.name) else found[m.name], m.size) for m in members],
        torch=torch,
    )
    image = assembled(laid)
    for member, (offset, nbytes), crc_at in zip(members, laid.extents, laid.crc_at, strict=True):
        assert (offset, nbytes) == (member.offset, member.nbytes)
        assert crc_at == member.crc_at
        if holes(member.name):
            image[offset : offset + nbytes] = found[member.name]
            for at in crc_at:
                image[at : at + 4] = member.crc.to_bytes(4, "little")
    return bytes(image)


# ---------------------------------------------------------------------------- golden files


@pytest.mark.parametrize("golden", [TORCH_MODEL, TORCH_EMPTY], ids=["model", "no tensor"])
@pytest.mark.parametrize("hole", ["/data/", "pkl", "nothing"])
def test_what_torch_wrote_is_written_again(golden: str, hole: str) -> None:
    """The bytes are those of torch.save, whichever members are filled in later."""
    raw = unpacked(golden)
    assert relaid(raw, lambda name: hole in name, torch=True) == raw


@pytest.mark.parametrize("hole", [".npy", "nothing"])
def test_what_numpy_wrote_is_written_again(hole: str) -> None:
    """The bytes are those of numpy.savez."""
    raw = unpacked(NUMPY)
    assert list(contents(raw)) == ["a/b.npy", "ü.npy", ".npy"]
    assert relaid(raw, lambda name: hole in name, torch=False) == raw


def test_torch_beyond_4_gib() -> None:
    """What precedes and follows a storage of 4 GiB is as torch's own writer has it."""
    huge = (1 << 32) + 5
    small = {
        "data.pkl": b"hello",
        "data/1": b"abc",
        "data/2": b"",
        "version": b"3\n",
        "byteorder": b"little",
        ".data/serialization_id": b"1110675698" + b"15213030001062180893147541622",
    }
    raw = unpacked(TORCH_HUGE)
    at = raw.index(b"PK\7\x08", raw.rindex(b"/serialization_id", 0, raw.index(b"PK\1\2")))
    small[".data/serialization_id"] = raw[at - 40 : at]
    order = ["data.pkl", "data/0", "data/1", "data/2", "version", "byteorder"]
    members = [
        NewMember(f"archive/{name}", small.get(name), len(small.get(name, b"")) or huge)
        for name in [*order, ".data/serialization_id"]
    ]
    members[3] = members[3]._replace(nbytes=0)
    laid = zips.lay_out(members, torch=True)
    assert laid.total == huge + len(raw)
    (first, head), (second, tail) = laid.literals
    assert (first, second) == (0, 192 + huge)
    tail_at = [at - second for at in laid.crc_at[1]]
    found = bytearray(tail)
    for at in tail_at:
        found[at : at + 4] = (2982322595).to_bytes(4, "little")
    assert head + found == raw


@pytest.mark.parametrize("torch", [True, False])
def test_archives_beyond_4_gib_are_read(tmp_path: Path, torch: bool) -> None:
    """Sizes and offsets beyond 32 bits come back, in zipfile and here."""
    sizes = {"a": 5, "huge": (1 << 32) + 7, "later": 1 << 31, "empty": 0, "z": 3}
    laid = zips.lay_out([NewMember(name, None, n) for name, n in sizes.items()], torch=torch)
    path = tmp_path / "huge.zip"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.truncate(fd, laid.total)
        for offset, data in laid.literals:
            os.pwrite(fd, data, offset)
        for offset, nbytes in laid.extents:
            os.pwrite(fd, b"mark"[:nbytes], offset)
        archive = zips.read_archive(fd, str(path), 0, laid.total, what=WHAT)
    finally:
        os.close(fd)
    assert {m.name: m.size for m in archive.members} == sizes
    assert [(m.offset, m.nbytes) for m in archive.members] == laid.extents
    assert [m.crc_at for m in archive.members] == laid.crc_at
    with zipfile.ZipFile(path) as oracle:
        assert {one.filename: one.file_size for one in oracle.infolist()} == sizes
        for name in ("huge", "later"):
            with oracle.open(name) as member:
                assert member.read(4) == b"mark"


def test_torch_aligns_to_64_bytes() -> None:
    """Each member of data begins at a multiple of 64, whatever its name is long."""
    members = [NewMember("x" * n, b"data", 4) for n in range(1, 70)]
    assert {offset % 64 for offset, _ in zips.lay_out(members, torch=True).extents} == {0}


def test_many_members_are_laid_out() -> None:
    """More than the end record can count are counted in the zip64 one."""
    members = [NewMember(str(n), b"", 0) for n in range(65_536)]
    raw = bytes(assembled(zips.lay_out(members, torch=False)))
    assert len(archive_of(raw).members) == 65_536
    with zipfile.ZipFile(io.BytesIO(raw)) as oracle:
        assert len(oracle.namelist()) == 65_536
    with pytest.raises(UnsupportedInput, match="100,000"):
        zips.lay_out(members * 2, torch=False)


# ---------------------------------------------------------------------------- sound archives

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
files = st.dictionaries(names, st.binary(max_size=300), max_size=6)


class Pipe(io.RawIOBase):
    """What cannot be sought, so that zipfile writes data descriptors."""

    def __init__(self) -> None:
        self.written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.written += data
        return len(data)


@few
@given(files, st.sampled_from([0, 8]), st.booleans(), st.binary(max_size=30))
def test_archives_of_zipfile(
    members: dict[str, bytes], method: int, piped: bool, comment: bytes
) -> None:
    """Members come in the order of their bytes, with the CRC at the places that are named."""
    buffer: Any = Pipe() if piped else io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=len(data) % 2 == 0) as file:
                file._compress_type = method
                file.write(data)
        archive.comment = b"" if b"PK" in comment else comment
    raw = bytes(buffer.written) if piped else buffer.getvalue()
    assert list(contents(raw).items()) == list(members.items())
    for member in archive_of(raw).members:
        found = [raw[at : at + 4] for at in member.crc_at]
        assert found == [member.crc.to_bytes(4, "little")] * 2


@few
@given(files, st.booleans())
def test_round_trip(members: dict[str, bytes], torch: bool) -> None:
    """What is laid out comes back, here and by zipfile."""
    new = [NewMember(name, data, len(data)) for name, data in members.items()]
    raw = bytes(assembled(zips.lay_out(new, torch=torch)))
    assert list(contents(raw).items()) == list(members.items())
    with zipfile.ZipFile(io.BytesIO(raw)) as oracle:
        assert oracle.testzip() is None
        assert [oracle.read(one) for one in oracle.infolist()] == list(members.values())


def test_an_archive_inside_a_file() -> None:
    """The archive is what lies between two offsets; its own are relative to the first."""
    raw, before = unpacked(TORCH_MODEL), b"PK\3\4 before"
    with opened(before + raw + b"after") as fd:
        archive = zips.read_archive(fd, "x", len(before), len(raw), what=WHAT)
        member = archive.by_name["model/version"]
        assert zips.member_bytes(fd, "x", member, 10) == b"3\n"
    alone = archive_of(raw)
    moved = [m._replace(offset=m.offset - len(before)) for m in archive.members]
    assert [m[:6] for m in moved] == [m[:6] for m in alone.members]
    assert (archive.start, archive.end) == (len(before), len(before) + len(raw))
    assert archive.directory == alone.directory == raw[-len(alone.directory) :]


def test_the_structure_knows_no_checksums() -> None:
    """Two archives that differ in their data alone have one structure; any other difference."""
    raw = zipped({"a": b"one", "b": b"two"})
    same = archive_of(raw).structure()
    assert archive_of(zipped({"a": b"six", "b": b"ten"})).structure() == same
    others = [{"a": b"one", "c": b"two"}, {"a": b"ones", "b": b"tw"}, {"ab": b"one", "": b"two"}]
    digests = {archive_of(zipped(one)).structure() for one in others}
    assert len(digests) == 3
    assert same not in digests


def test_many_members_are_read_in_linear_time() -> None:
    """20,000 members take a fifth of a second; that it is not minutes is what can be tested."""
    members = [NewMember(f"archive/data/{n}", bytes(n % 40), n % 40) for n in range(20_000)]
    raw = bytes(assembled(zips.lay_out(members, torch=True)))
    assert len(archive_of(raw).members) == 20_000


# ---------------------------------------------------------------------------- damaged archives

SMALL = [
    zipped({"a": b"one", "b/c": b"two" * 9}),
    zipped({"a": b"one" * 9, "ü": b""}, 8, b"comment"),
    unpacked(NUMPY),
]


@pytest.mark.parametrize("raw", [*SMALL, unpacked(TORCH_EMPTY)])
def test_truncated(raw: bytes) -> None:
    """No prefix of an archive is one."""
    for length in range(len(raw)):
        with pytest.raises(DamagedFile, match=r"^x\.zip: "):
            archive_of(raw[:length])


@pytest.mark.parametrize("raw", [*SMALL, unpacked(TORCH_EMPTY)])
def test_flipped_bytes(raw: bytes) -> None:
    """A flipped bit is found, or changes nothing that is read."""
    right = contents(raw)
    for at, bit in itertools.product(range(len(raw)), (1, 0x80)):
        flipped = bytearray(raw)
        flipped[at] ^= bit
        with contextlib.suppress(InputError):
            assert contents(bytes(flipped)) == right


A, B = b"first member", b"second member"
HONEST = zipped({"a": A, "b": B})
LOCAL_B = 30 + 1 + len(A)
CENTRAL_A = LOCAL_B + 30 + 1 + len(B)
CENTRAL_B = CENTRAL_A + 47
END = CENTRAL_B + 47


def edited(*changes: tuple[int, bytes]) -> bytes:
    """Return the honest archive with these bytes at these offsets."""
    raw = bytearray(HONEST)
    for at, data in changes:
        raw[at : at + len(data)] = data
    return bytes(raw)


def u16(number: int) -> bytes:
    """Return a number of two bytes."""
    return number.to_bytes(2, "little")


def u32(number: int) -> bytes:
    """Return a number of four bytes."""
    return number.to_bytes(4, "little")


def with_zip64(**lies: int) -> bytes:
    """Return the honest archive with zip64 end records that may lie."""
    here = {"disks": 1, "offset": END, "count": 2, "size": 94, "at": CENTRAL_A, "bytes": 44}
    here |= lies
    record = zipdirectory.END64.pack(
        b"PK\6\6", here["bytes"], 45, 45, 0, 0, 2, here["count"], here["size"], here["at"]
    )
    locator = zipdirectory.LOCATOR.pack(b"PK\6\7", 0, here["offset"], here["disks"])
    return HONEST[:END] + record + locator + HONEST[END:]


def test_the_honest_ones_are_read() -> None:
    """What the attacks start from is sound."""
    assert contents(HONEST) == contents(with_zip64()) == {"a": A, "b": B}
    assert contents(HONEST[:-2] + u16(7) + b"comment") == {"a": A, "b": B}


DAMAGED = {
    "nothing": (b"", "expected an archive for tests, found no zip archive"),
    "a pickle": (b"\x80\2}." * 20, "expected an archive for tests, found no zip archive"),
    "no end": (HONEST[:-22], "truncated"),
    "bytes before": (b"junk" + HONEST, "ends at offset"),
    "bytes before, told": (
        b"junk" + edited((CENTRAL_A + 42, u32(4)), (CENTRAL_B + 42, u32(LOCAL_B + 4)),
                         (END + 16, u32(CENTRAL_A + 4))),
        "header at offset 0",
    ),
    "bytes behind": (HONEST + b"junk", "other bytes follow"),
    "a comment too short": (HONEST[:-2] + u16(9) + b"comment", "other bytes follow"),
    "bytes between": (HONEST[:CENTRAL_A] + b"junk" + HONEST[CENTRAL_A:], "ends at offset"),
    "a hole": (
        HONEST[:CENTRAL_A] + b"junk" + edited((END + 16, u32(CENTRAL_A + 4)))[CENTRAL_A:],
        "4 unexpected bytes follow it",
    ),
    "one name twice": (edited((LOCAL_B + 30, b"a"), (CENTRAL_B + 46, b"a")), "two members"),
    "another name inside": (edited((30, b"x")), "calls it 'x'"),
    "another length inside": (edited((26, u16(2))), "disagree"),
    "another flag inside": (edited((6, u16(1 << 11))), "disagree"),
    "another method inside": (edited((8, u16(8))), "disagree"),
    "another size inside": (edited((18, u32(3))), "disagree"),
    "another CRC inside": (edited((14, u32(3))), "disagree"),
    "no local header": (edited((0, b"XX")), "local header"),
    "no entry": (edited((CENTRAL_B, b"XX")), "directory entry"),
    "unknown flags": (
        edited((6, u16(1 << 5)), (CENTRAL_A + 8, u16(1 << 5))), "unknown flags 0x0020"
    ),
    "a flag without a descriptor": (
        edited((6, u16(8)), (CENTRAL_A + 8, u16(8))), "no descriptor"
    ),
    "another disk": (edited((CENTRAL_A + 34, u16(1))), "file 1"),
    "overlapping": (edited((CENTRAL_B + 42, u32(5))), "overlaps"),
    "one header for both": (edited((CENTRAL_B + 42, u32(0))), "overlaps"),
    "an offset outside": (edited((CENTRAL_B + 42, u32(1 << 30))), "unexpected bytes"),
    "too large": (
        edited((18, u32(99) * 2), (CENTRAL_A + 20, u32(99) * 2)), "overlaps"
    ),
    "sizes that differ": (edited((CENTRAL_A + 24, u32(99))), "cannot be 99 bytes"),
    "not ASCII": (edited((30, b"\xe9"), (CENTRAL_A + 46, b"\xe9")), "a name in ASCII"),
    "not UTF-8": (
        edited(
            *((at, u16(1 << 11)) for at in (6, CENTRAL_A + 8)),
            *((at, b"\xe9") for at in (30, CENTRAL_A + 46)),
        ),
        "a name in UTF-8",
    ),
    "no zip64 field": (edited((CENTRAL_A + 20, u32(0xFFFFFFFF))), "zip64 field"),
    "an extra field of nothing": (edited((CENTRAL_A + 30, u16(3))), "truncated"),
    "one member more": (edited((END + 8, u16(3) * 2)), "3 zip members need"),
    "one member less": (edited((END + 8, u16(1) * 2)), "directory of 47 bytes"),
    "two counts": (edited((END + 8, u16(1))), "several files"),
    "a directory outside": (edited((END + 16, u32(1 << 31))), "ends at offset"),
    "a directory of 4 GiB": (edited((END + 12, u32(0xFFFFFFFF))), "ends at offset"),
    "a locator of another place": (with_zip64(offset=END + 1), "locator"),
    "a locator of no place": (with_zip64(offset=1 << 60), "locator"),
    "a locator of disks": (with_zip64(disks=2), "locator"),
    "a record of another size": (with_zip64(bytes=45), "zip64 end record"),
    "another zip64 count": (with_zip64(count=3), "disagree"),
    "another zip64 directory": (with_zip64(at=CENTRAL_A - 1), "disagree"),
    "a locator alone": (
        HONEST[:END] + zipdirectory.LOCATOR.pack(b"PK\6\7", 0, 0, 1) + HONEST[END:], "locator"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case: str) -> None:
    """Each broken invariant has an error of its own."""
    raw, reason = DAMAGED[case]
    with pytest.raises(DamagedFile) as caught:
        archive_of(raw)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (edited((6, u16(1)), (CENTRAL_A + 8, u16(1))), "encrypted"),
        (edited((8, u16(99)), (CENTRAL_A + 10, u16(99))), "method 99"),
        (zipped({"a": A}, zipfile.ZIP_LZMA), "method 14"),
        (zipped({"a": A}, zipfile.ZIP_BZIP2), "method 12"),
    ],
)
def test_unsupported(raw: bytes, reason: str) -> None:
    """What other archives may be is named."""
    with pytest.raises(UnsupportedInput, match=f"^x.zip: zip member 'a': .*{reason}"):
        archive_of(raw)


def entry(name: bytes, extra: bytes = b"", *, nbytes: int = 0, header: int = 0) -> bytes:
    """Return a directory entry."""
    fields = (20, 20, 0, 0, 0, 0, 0, nbytes, nbytes, len(name), len(extra), 0, 0, 0, 0, header)
    return zipdirectory.CENTRAL.pack(b"PK\1\2", *fields) + name + extra


@pytest.mark.parametrize(
    "extra",
    [
        b"\1\0\x08\0" + bytes(8) + b"\1\0\x08\0" + bytes(8),
        b"\1\0\x09\0" + bytes(9),
        b"\1\0\x20\0" + bytes(8),
        b"\1\0\x08\0" + bytes(8),
        b"\x75\x70\5\0\1" + bytes(4),
        b"\1",
    ],
    ids=["twice", "9 bytes", "too long", "for nothing", "another name", "half"],
)
def test_extra_fields(extra: bytes) -> None:
    """An entry holds no numbers that it does not need, nor another name."""
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    directory = entry(b"a", extra)
    end = zipdirectory.END.pack(b"PK\5\6", 0, 0, 1, 1, len(directory), len(local), 0)
    with pytest.raises(DamagedFile, match="zip member 'a'"):
        archive_of(local + directory + end)


@pytest.mark.parametrize("count", [zipdirectory.MEMBER_LIMIT + 1, 1 << 62])
def test_too_many_members(count: int) -> None:
    """Their number is checked before they are read."""
    nbytes = min(count, 110_000) * zipdirectory.CENTRAL.size
    numbers = (count, count, nbytes, 0)
    record = zipdirectory.END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, *numbers)
    locator = zipdirectory.LOCATOR.pack(b"PK\6\7", 0, nbytes, 1)
    end = zipdirectory.END.pack(b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, nbytes, 0, 0)
    with pytest.raises(DamagedFile, match="at most 100,000 zip members"):
        archive_of(bytes(nbytes) + record + locator + end)


def test_a_directory_too_large(tmp_path: Path) -> None:
    """Its size is checked before it is read."""
    path = tmp_path / "large.zip"
    nbytes = zipdirectory.DIRECTORY_LIMIT + 1
    with open(path, "wb") as file:
        file.truncate(nbytes)
        file.seek(nbytes)
        file.write(zipdirectory.END.pack(b"PK\5\6", 0, 0, 1, 1, nbytes, 0, 0))
    with open(path, "rb") as file, pytest.raises(DamagedFile, match=r"at most 64\.0 MiB"):
        zips.read_archive(file.fileno(), "x", 0, path.stat().st_size, what=WHAT)


def test_names_end_at_a_nul_elsewhere() -> None:
    """Two names that only we tell apart are one name twice."""
    local = [
        struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 3, 0) + name
        for name in (b"a\0b", b"a\0c", b"a\0b")
    ]
    one = entry(b"a\0b")
    end = zipdirectory.END.pack(b"PK\5\6", 0, 0, 1, 1, len(one), 33, 0)
    assert list(contents(local[0] + one + end)) == ["a\0b"]
    two = one + entry(b"a\0c", header=33)
    end = zipdirectory.END.pack(b"PK\5\6", 0, 0, 2, 2, len(two), 66, 0)
    with pytest.raises(DamagedFile, match="two members have this name"):
        archive_of(local[0] + local[1] + two + end)


# ---------------------------------------------------------------------------- members


def deflated(stream: bytes, size: int, crc: int) -> bytes:
    """Return an archive with one deflated member of this stream."""
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 0, crc, len(stream), size, 1, 0)
    fields = (20, 20, 0, 8, 0, 0, crc, len(stream), size, 1, 0, 0, 0, 0, 0, 0)
    directory = zipdirectory.CENTRAL.pack(b"PK\1\2", *fields) + b"a"
    at = len(local) + 1 + len(stream)
    end = zipdirectory.END.pack(b"PK\5\6", 0, 0, 1, 1, len(directory), at, 0)
    return local + b"a" + stream + directory + end


def stream_of(data: bytes) -> bytes:
    """Return a raw deflate stream."""
    squeeze = zlib.compressobj(9, wbits=-15)
    return squeeze.compress(data) + squeeze.flush()


def inflated(raw: bytes, *, unchecked: bool = False) -> list[bytes]:
    """Return the pieces of the only member."""
    pieces: list[bytes] = []
    with opened(raw) as fd:
        (member,) = zips.read_archive(fd, "x", 0, len(raw), what=WHAT).members
        zips.inflate_to(fd, "x", member, lambda p: pieces.append(bytes(p)), unchecked=unchecked)
    return pieces


@pytest.mark.parametrize("method", [0, 8])
@pytest.mark.parametrize("size", [0, 1, 1 << 18, (1 << 18) + 1, 3 << 20])
def test_members_come_in_pieces(method: int, size: int) -> None:
    """A member is never held as a whole, however much it inflates to."""
    data = (np.arange(size) >> 9).astype("u1").tobytes()
    pieces = inflated(zipped({"a": data}, method))
    assert b"".join(pieces) == data
    assert max(map(len, pieces), default=0) <= 1 << 18


ZEROS = bytes(1 << 20)
BOMB = stream_of(ZEROS)
BAD_STREAMS = {
    "more than it says": (BOMB, 5000, "found more"),
    "less than it says": (BOMB, len(ZEROS) + 1, "found 1,048,576"),
    "it ends early": (BOMB[:-9], len(ZEROS), "does not end where"),
    "bytes follow": (BOMB + b"junk", len(ZEROS), "does not end where"),
    "many bytes follow": (BOMB + bytes(1 << 19), len(ZEROS), "does not end where"),
    "no stream": (b"\xff" * 2000, len(ZEROS), "not a deflate stream"),
    "nothing": (b"", 0, "does not end where"),
}


@pytest.mark.parametrize("case", BAD_STREAMS)
def test_bad_streams(case: str) -> None:
    """A stream yields what its member says, and ends where it does."""
    stream, size, reason = BAD_STREAMS[case]
    with pytest.raises(DamagedFile, match=f"zip member 'a': .*{reason}"):
        inflated(deflated(stream, size, zlib.crc32(ZEROS)))


@few
@given(st.binary(max_size=300), st.integers(0, 60), st.binary(max_size=40), st.integers(1, 50))
def test_streams_end_where_members_do(data: bytes, times: int, tail: bytes, most: int) -> None:
    """However the pieces fall, a stream is whole and nothing follows it, or it is refused."""
    whole = data * times
    stream = stream_of(whole)
    for found, sound in ((stream + tail, not tail), (stream[:-1], False)):
        raw = deflated(found, len(whole), zlib.crc32(whole))
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as refused:
            patch.setattr(zips, "_PIECE", most)
            if not sound:
                refused.enter_context(pytest.raises(DamagedFile))
            assert b"".join(inflated(raw)) == whole


def test_what_no_stream_can_hold() -> None:
    """A ratio beyond that of deflate is a lie."""
    assert inflated(deflated(BOMB, len(ZEROS), zlib.crc32(ZEROS)))
    with pytest.raises(DamagedFile, match="cannot be"):
        archive_of(deflated(b"x" * 10, 10_321, 0))


@pytest.mark.parametrize("method", [0, 8])
def test_wrong_crc(method: int) -> None:
    """A CRC is checked; 0 stands for none only where that is said."""
    right = zlib.crc32(A)
    raw = zipped({"a": A}, method)
    wrong = raw.replace(u32(right), u32(right ^ 1))
    none = raw.replace(u32(right), u32(0))
    with pytest.raises(
        DamagedFile, match=f"expected CRC-32 {right ^ 1:#010x}, found {right:#010x}"
    ):
        inflated(wrong)
    with pytest.raises(DamagedFile, match="expected CRC-32 0x00000000"):
        inflated(none)
    with pytest.raises(DamagedFile, match="expected CRC-32"):
        inflated(wrong, unchecked=True)
    assert inflated(none, unchecked=True) == [A]


def test_small_members_have_a_limit() -> None:
    """What is taken for small is checked to be so, stored or inflated."""
    raw = deflated(BOMB, len(ZEROS), zlib.crc32(ZEROS))
    with opened(raw) as fd:
        (member,) = zips.read_archive(fd, "x", 0, len(raw), what=WHAT).members
        assert zips.member_bytes(fd, "x", member, len(ZEROS)) == ZEROS
        with pytest.raises(DamagedFile, match=r"at most 1,023\.0 KiB, found 1\.0 MiB"):
            zips.member_bytes(fd, "x", member, len(ZEROS) - 1024)


@pytest.mark.parametrize("method", [0, 8])
def test_the_start_of_a_member(method: int) -> None:
    """The first bytes are to be had without the rest."""
    data = bytes(range(256)) * 100
    raw = zipped({"a": data, "b": b"short", "c": b""}, method)
    with opened(raw) as fd:
        archive = zips.read_archive(fd, "x", 0, len(raw), what=WHAT)
        for nbytes in (0, 7, 300, 20_000):
            expected = [data[:nbytes], b"short"[:nbytes], b""]
            assert list(zips.member_starts(fd, "x", archive, nbytes)) == expected
            again = [zips.member_start(fd, "x", member, nbytes) for member in archive.members]
            assert again == expected
