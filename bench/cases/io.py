"""Storing quantized blocks and reading them back: megabytes a second of the file made in memory, written and synced, and read with all its checks.

`bench/store.c`, blocks with random codes of LLaMA's shape with hidden size 2048 (51 million weights), groups of 128, in the temporary folder
(`TMPDIR` chooses the disk).
"""

COLUMNS = {
    "bits": "of a weight",
    "mb": "megabytes of a block's file, by which all columns count",
    "make_mb_s": "`block_image_make`: HDF5 with checksums, in memory; the median block",
    "write_mb_s": "`store_write_block`: written, synced, renamed, its folder synced, and the master file written and synced too; the median block",
    "limit_write_mb_s": "the same bytes in one plain file, written, synced, renamed and its folder synced; the median",
    "read_mb_s": "`store_read_block`: structure, checksums, shapes and values checked; the file's pages are in memory; the median block",
    "limit_read_mb_s": "the same bytes read as they are; the median",
}
LIMIT = ("the disk's and the page cache's own speed with the same bytes (`limit_write_mb_s`, `limit_read_mb_s`), measured in turn with each "
         "block; disks that others use vary")


def options(parser):
    parser.add_argument("--hidden", type=int, default=2048, help="default 2048")
    parser.add_argument("--ffn", type=int, default=5632, help="width of the MLP (5632)")
    parser.add_argument("--repeats", type=int, default=5, help="blocks (5)")


def rows(bench, arguments):
    sizes = ["--hidden", arguments.hidden, "--ffn", arguments.ffn, "--repeats", arguments.repeats]
    said, _ = bench.run([bench.program("bench/store"), *sizes, bench.folder])
    yield from bench.json_lines(said)
