/* store.h: the quantized model in HDF5 (docs/format.md): OUT/omniquant.h5 with the run's attributes and external links to
 * OUT/blocks/NNNN.h5, one file a block, each written under a temporary name, synced and renamed: a block file that is there is whole.
 * Calls may come from different threads of one process, not at the same time for one store. */
#ifndef OMNIQUANT_STORE_H
#define OMNIQUANT_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "store_info.h"

/* One quantized linear layer, host memory. */
struct quantized_linear {
  char name[96];        /* as in the checkpoint without block prefix and ".weight": "self_attn.q_proj" */
  int64_t out_features; /* C_out */
  int64_t in_features;  /* C_in */
  int bits;             /* 2..8 */
  int64_t group_size;   /* columns a group, the last may be short; C_in for per channel */
  bool symmetric;
  uint8_t *codes;      /* [C_out, ceil(C_in * bits / 8)] packed little-endian bit order along the row */
  uint16_t *scale;     /* [C_out, groups] fp16 bits, groups = ceil(C_in / group_size) */
  uint8_t *zero_point; /* [C_out, groups] */
};

/* A small named fp32 array: a folded norm or bias, or what calibration learned ("self_attn.q_proj.gamma"). */
struct named_array {
  char name[96];
  int dimensions; /* 1 or 2 */
  int64_t shape[2];
  float *values; /* row-major */
};

/* One block as stored. All pointers are owned by the record and freed by block_record_free. */
struct block_record {
  int index;
  bool lent; /* what linears and arrays point to is another's, who outlives the record: only the lists of them are the record's */
  double loss_rtn, loss_start, loss_end; /* mean loss over all samples: RTN, parameters before and after training; NaN if not measured */
  char kept[8];                          /* which of them is stored: "rtn", "start" or "end" */
  int64_t skipped_steps;                 /* steps whose loss or gradient was not finite */
  int untrained_experts;                 /* experts that saw no calibration token and were rounded to nearest */
  double seconds;                        /* wall time of the block */
  int world_size;                        /* ranks that calibrated it */
  struct named_array timing; /* [world_size, phases] seconds of each rank in each phase; without values in files of earlier versions */
  char phases[128];          /* their names, comma-separated: "wait,target"; empty without values */
  int linears;
  struct quantized_linear *linear; /* [linears] */
  int folded_arrays;
  struct named_array *folded; /* [folded_arrays] what a transformation changed and stays unquantized; stored under its own name in /block */
  int calibration_arrays;
  struct named_array *calibration; /* [calibration_arrays] stored in /block/calibration */
};

/* Frees what the linear points to, and leaves it without. */
void quantized_linear_free(struct quantized_linear *linear);

/* Frees what the record points to and zeroes it. */
void block_record_free(struct block_record *record);

/* Bytes of one packed row. */
static inline int64_t packed_row_bytes(int64_t in_features, int bits) {
  return (in_features * bits + 7) / 8;
}

/* Code i of a packed row. */
static inline int packed_code(const uint8_t *row, int64_t i, int bits) {
  int64_t position = i * bits;
  uint32_t window = row[position / 8];
  if (position % 8 + bits > 8) window |= (uint32_t)row[position / 8 + 1] << 8;
  return (int)(window >> position % 8 & ((1u << bits) - 1));
}

struct store; /* an open store */

/* Makes OUT, OUT/blocks and OUT/omniquant.h5 for a run, or goes on with the run that OUT holds if it is the same (store_info_same); its
 * master file may be damaged or missing as long as a block file tells of which run it is. What a killed writer left is removed. The folder
 * is locked until store_close. ERROR_INPUT if OUT holds another run (the difference is named) or anything else, is in use by another
 * process, cannot be made, or if `info` is not fit to be stored: nothing of it is touched then. ERROR_WORK if the disk is full. *store is
 * NULL on failure. */
int store_create(const char *folder, const struct store_info *info, struct store **store, struct error *error);

/* Opens a store to read. ERROR_INPUT if it is not one, is of an unknown version, or a link leads outside the folder. */
int store_open(const char *folder, struct store **store, struct error *error);

/* The same where the master file is damaged or missing: by what the block files say. Nothing is written. ERROR_INPUT: none says anything. */
int store_recover(const char *folder, struct store **store, struct error *error);

/* Writes the master file of a recovered store anew. ERROR_INPUT if another process writes there, ERROR_WORK. */
int store_repair(struct store *store, struct error *error);

const struct store_info *store_info(const struct store *store);

/* Whether block `index` is there. */
bool store_has_block(const struct store *store, int index);

/* A block's file in memory, made on the rank that calibrated it and written on the rank that holds the store. */
struct block_image {
  int index;
  void *bytes; /* freed by block_image_free */
  size_t length;
};
void block_image_free(struct block_image *image);

/* Makes a record's file, which takes as many bytes as its packed codes; `where` starts messages. ERROR_WORK without memory and for a record
 * that could not be read back (names, shapes, `kept`, a scale that is not finite, a zero point that is not a code). */
int block_image_make(struct block_image *image, const struct block_record *record, const struct store_info *info /* of its run */,
                     const char *where, struct error *error);

/* Writes one block: temporary file, fsync, rename, fsync of the folder, then its link in the master file. ERROR_WORK on failure: what was stored
 * before stays whole. */
int store_write_block(struct store *store, const struct block_image *image, struct error *error);

/* One stored block that is open, to be read a linear at a time. The record receives all but what its linears point to and what calibration
 * learned; otherwise as store_read_block. */
struct block_file;
int store_open_block(struct store *store, int index, struct block_file **file, struct block_record *record, /* block_record_free */
                     struct error *error);

/* Reads what one of its record's linears points to; quantized_linear_free, or block_record_free. */
int block_file_read_linear(struct block_file *file, struct quantized_linear *linear, struct error *error);

/* NULL is allowed. */
void block_file_close(struct block_file *file);

/* Reads one block, checksums verified, shapes checked against each other, and that it is of this run; linears and arrays come in order of
 * name. Errors name the file and the dataset. */
int store_read_block(struct store *store, int index, struct block_record *record, /* receives the block, block_record_free */
                     struct error *error);

/* Removes what store_create made if no block has been written since, and says whether it has. NULL is allowed; the store stays open. */
bool store_abandon(const struct store *store);

/* Closes and unlocks; NULL is allowed. Returns the error's code, as it was before. */
int store_close(struct store *store, struct error *error);

#endif
