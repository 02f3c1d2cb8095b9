/* block_file.c: writing and reading one block's HDF5 file. Paths of datasets are relative to the group /block. */
#include "block_file.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "printable.h"
#include "store_attributes.h"

enum {
  PATH_BYTES = 128,      /* "calibration/" or a linear's name and "/zero_point", around a name of 95 bytes */
  CHUNK_BYTES = 1 << 20, /* HDF5's chunk cache holds this much */
  MAX_WORLD = 1 << 24,   /* ranks: only to tell damage from a number */
  MAX_EXPERTS = 1 << 24  /* of a block, likewise */
};
static const int64_t MAX_SIZE = (int64_t)1 << 40; /* of a dimension: products of two stay below 2^63 after the check against bytes */
static const char CALIBRATION[] = "calibration", TIMING[] = "timing", PHASES[] = "phases", RUN[] = "run";

/* The types of datasets. */
enum element { ELEMENT_U8, ELEMENT_HALF, ELEMENT_F32 };

static size_t element_size(enum element element) {
  return element == ELEMENT_U8 ? 1 : element == ELEMENT_HALF ? 2 : 4;
}

/* The type as stored (little endian) or in memory; closed by the caller. HDF5 1.10 has no name for binary16, so it is spelled out. */
static hid_t element_type(enum element element, bool memory) {
  if (element == ELEMENT_U8) return H5Tcopy(memory ? H5T_NATIVE_UINT8 : H5T_STD_U8LE);
  hid_t type = H5Tcopy(memory ? H5T_NATIVE_FLOAT : H5T_IEEE_F32LE);
  if (element == ELEMENT_F32 || type < 0) return type;
  if (H5Tset_fields(type, 15, 10, 5, 0, 10) >= 0 && H5Tset_size(type, 2) >= 0 && H5Tset_ebias(type, 15) >= 0) return type;
  hdf5_close(type);
  return -1;
}

static int64_t linear_groups(const struct quantized_linear *linear) {
  return (linear->in_features - 1) / linear->group_size + 1;
}

/* A name that is one step of a path, or, where folders are allowed, several. */
static bool name_is_plain(const char *name, size_t size, bool folders) {
  size_t length = strnlen(name, size);
  if (length == 0 || length == size || name[0] == '/' || name[length - 1] == '/' || strstr(name, "//")) return false;
  if (strcmp(name, ".") == 0 || strcmp(name, CALIBRATION) == 0 || strcmp(name, TIMING) == 0) return false;
  if (strncmp(name, "./", 2) == 0 || strstr(name, "/./") || (length > 1 && strcmp(name + length - 2, "/.") == 0)) return false;
  return folders || !strchr(name, '/');
}

/* Checks the numbers of a linear, before its arrays are there. */
static int linear_check(const struct hdf5_site *site, int code, const struct quantized_linear *linear) {
  if (linear->bits >= 2 && linear->bits <= 8 && linear->group_size >= 1 && linear->group_size <= MAX_SIZE && linear->in_features >= 1 &&
      linear->in_features <= MAX_SIZE && linear->out_features >= 1 && linear->out_features <= MAX_SIZE) {
    return 0;
  }
  return error_set(site->error, code, "%s: %s: bits %d, group_size %lld, shape [%lld, %lld] are not those of a quantized linear",
                   site->path, printable(linear->name).text, linear->bits, (long long)linear->group_size, (long long)linear->out_features,
                   (long long)linear->in_features);
}

/* Checks its scales and zero points. */
static int values_check(const struct hdf5_site *site, int code, const struct quantized_linear *linear) {
  int64_t count = linear->out_features * linear_groups(linear);
  for (int64_t i = 0; i < count; i++) {
    bool finite = (linear->scale[i] & 0x7c00) != 0x7c00, inside = linear->zero_point[i] < 1 << linear->bits;
    if (finite && inside) continue;
    return error_set(site->error, code, "%s: %s: row %lld, group %lld: %s", site->path, printable(linear->name).text,
                     (long long)(i / linear_groups(linear)), (long long)(i % linear_groups(linear)),
                     finite ? "the zero point is not a code" : "the scale is not a finite number");
  }
  return 0;
}

static bool kept_is_known(const char *kept) {
  return strcmp(kept, "rtn") == 0 || strcmp(kept, "start") == 0 || strcmp(kept, "end") == 0;
}

/* Checks the times, if there are any: a row a rank, a column a name. */
static int timing_check(const struct hdf5_site *site, int code, const struct block_record *record) {
  const struct named_array *timing = &record->timing;
  int64_t names = 1;
  if (!timing->values) return 0;
  bool plain = strnlen(record->phases, sizeof record->phases) < sizeof record->phases && *record->phases &&
               record->phases[strspn(record->phases, "abcdefghijklmnopqrstuvwxyz_,")] == 0;
  for (const char *c = record->phases; plain && *c; c++) names += *c == ',';
  if (!plain || timing->dimensions != 2 || timing->shape[0] != record->world_size || timing->shape[1] != names)
    return error_set(site->error, code, "%s: timing: is not seconds of %d ranks in the phases '%s'", site->path, record->world_size,
                     printable(record->phases).text);
  for (int64_t i = 0; i < timing->shape[0] * timing->shape[1]; i++)
    if (!isfinite(timing->values[i]) || timing->values[i] < 0)
      return error_set(site->error, code, "%s: timing: rank %lld: %g seconds are no time", site->path, (long long)(i / names),
                       (double)timing->values[i]);
  return 0;
}

/* What is written must be what block_file_open and what follows it accept. */
static int record_check(const struct hdf5_site *site, const struct block_record *record) {
  if (!kept_is_known(record->kept) || record->world_size < 1 || record->world_size > MAX_WORLD || record->skipped_steps < 0 ||
      record->untrained_experts < 0 || record->untrained_experts > MAX_EXPERTS) {
    return error_set(site->error, ERROR_WORK,
                     "%s: block %d: kept '%.7s', world_size %d, skipped_steps %lld, untrained_experts %d cannot be stored", site->path,
                     record->index, record->kept, record->world_size, (long long)record->skipped_steps, record->untrained_experts);
  }
  for (int i = 0; i < record->linears; i++) {
    const struct quantized_linear *linear = &record->linear[i];
    if (!name_is_plain(linear->name, sizeof linear->name, false)) goto bad_name;
    if (linear_check(site, ERROR_WORK, linear) || values_check(site, ERROR_WORK, linear)) return site->error->code;
  }
  for (int i = 0; i < record->folded_arrays + record->calibration_arrays; i++) {
    bool folded = i < record->folded_arrays;
    const struct named_array *array = folded ? &record->folded[i] : &record->calibration[i - record->folded_arrays];
    if (!name_is_plain(array->name, sizeof array->name, !folded)) goto bad_name;
    bool good = array->dimensions == 1 || array->dimensions == 2;
    for (int d = 0; good && d < array->dimensions; d++) good = array->shape[d] >= 0 && array->shape[d] <= MAX_SIZE;
    if (!good) return error_set(site->error, ERROR_WORK, "%s: %s: cannot be stored with this shape", site->path, array->name);
  }
  return timing_check(site, ERROR_WORK, record);
bad_name:
  return error_set(site->error, ERROR_WORK, "%s: block %d has a linear or array whose name cannot be stored", site->path, record->index);
}

/* ---- writing ---- */

/* Creation properties: chunks of about CHUNK_BYTES with checksums, cut evenly along the first dimension. */
static hid_t creation_make(enum element element, int dimensions, const hsize_t *shape) {
  hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  hsize_t chunk[2] = {shape[0], dimensions > 1 ? shape[1] : 1};
  hsize_t row_bytes = chunk[1] * element_size(element);
  if (creation < 0 || shape[0] == 0 || row_bytes == 0) return creation; /* an empty dataset cannot have chunks */
  hsize_t rows = row_bytes < CHUNK_BYTES ? CHUNK_BYTES / row_bytes : 1, chunks = (shape[0] + rows - 1) / rows;
  chunk[0] = (shape[0] + chunks - 1) / chunks;
  if (H5Pset_chunk(creation, dimensions, chunk) >= 0 && H5Pset_fletcher32(creation) >= 0) return creation;
  hdf5_close(creation);
  return -1;
}

/* Writes one dataset, making the groups on its path. */
static int dataset_write(const struct hdf5_site *site, hid_t block, const char *path, enum element element, int dimensions,
                         const int64_t *shape, const void *values) {
  hsize_t extent[2] = {(hsize_t)shape[0], dimensions > 1 ? (hsize_t)shape[1] : 1};
  hid_t stored = element_type(element, false), memory = element_type(element, true), dataset = -1;
  hid_t space = H5Screate_simple(dimensions, extent, NULL), creation = creation_make(element, dimensions, extent);
  hid_t link = H5Pcreate(H5P_LINK_CREATE);
  int failed = stored < 0 || memory < 0 || space < 0 || creation < 0 || link < 0 || H5Pset_create_intermediate_group(link, 1) < 0;
  if (!failed) {
    dataset = H5Dcreate2(block, path, stored, space, link, creation, H5P_DEFAULT);
    failed = dataset < 0 || (extent[0] * extent[1] > 0 && H5Dwrite(dataset, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) < 0);
  }
  if (failed) failed = hdf5_write_failed(site, path);
  if (dataset >= 0 && H5Dclose(dataset) < 0 && !failed) failed = hdf5_write_failed(site, path); /* closing writes what is cached */
  hdf5_close(link);
  hdf5_close(creation);
  hdf5_close(space);
  hdf5_close(memory);
  hdf5_close(stored);
  return failed;
}

static int linear_write(const struct hdf5_site *site, hid_t block, const struct quantized_linear *linear) {
  char path[PATH_BYTES];
  int64_t codes[2] = {linear->out_features, packed_row_bytes(linear->in_features, linear->bits)};
  int64_t groups[2] = {linear->out_features, linear_groups(linear)};
  snprintf(path, sizeof path, "%s/codes", linear->name);
  int failed = dataset_write(site, block, path, ELEMENT_U8, 2, codes, linear->codes);
  snprintf(path, sizeof path, "%s/scale", linear->name);
  if (!failed) failed = dataset_write(site, block, path, ELEMENT_HALF, 2, groups, linear->scale);
  snprintf(path, sizeof path, "%s/zero_point", linear->name);
  if (!failed) failed = dataset_write(site, block, path, ELEMENT_U8, 2, groups, linear->zero_point);
  if (!failed) failed = hdf5_write_integer(site, block, linear->name, "bits", linear->bits);
  if (!failed) failed = hdf5_write_integer(site, block, linear->name, "group_size", linear->group_size);
  if (!failed) failed = hdf5_write_integer(site, block, linear->name, "in_features", linear->in_features);
  if (!failed) failed = hdf5_write_integer(site, block, linear->name, "symmetric", linear->symmetric);
  return failed;
}

static int attributes_write(const struct hdf5_site *site, hid_t block, const struct block_record *record) {
  int failed = hdf5_write_integer(site, block, ".", "index", record->index);
  if (!failed) failed = hdf5_write_real(site, block, ".", "loss_rtn", record->loss_rtn);
  if (!failed) failed = hdf5_write_real(site, block, ".", "loss_start", record->loss_start);
  if (!failed) failed = hdf5_write_real(site, block, ".", "loss_end", record->loss_end);
  if (!failed) failed = hdf5_write_text(site, block, ".", "kept", record->kept);
  if (!failed) failed = hdf5_write_integer(site, block, ".", "skipped_steps", record->skipped_steps);
  if (!failed) failed = hdf5_write_integer(site, block, ".", "untrained_experts", record->untrained_experts);
  if (!failed) failed = hdf5_write_real(site, block, ".", "seconds", record->seconds);
  if (!failed) failed = hdf5_write_integer(site, block, ".", "world_size", record->world_size);
  return failed;
}

static int block_write(const struct hdf5_site *site, hid_t file, const struct block_record *record) {
  char path[PATH_BYTES];
  hid_t block = hdf5_make_group(site, file, "block");
  if (block < 0) return site->error->code;
  int failed = attributes_write(site, block, record);
  for (int i = 0; i < record->linears && !failed; i++) failed = linear_write(site, block, &record->linear[i]);
  for (int i = 0; i < record->folded_arrays && !failed; i++) {
    const struct named_array *array = &record->folded[i];
    failed = dataset_write(site, block, array->name, ELEMENT_F32, array->dimensions, array->shape, array->values);
  }
  for (int i = 0; i < record->calibration_arrays && !failed; i++) {
    const struct named_array *array = &record->calibration[i];
    snprintf(path, sizeof path, "%s/%s", CALIBRATION, array->name);
    failed = dataset_write(site, block, path, ELEMENT_F32, array->dimensions, array->shape, array->values);
  }
  if (record->timing.values && !failed) {
    failed = dataset_write(site, block, TIMING, ELEMENT_F32, record->timing.dimensions, record->timing.shape, record->timing.values);
    if (!failed) failed = hdf5_write_text(site, block, TIMING, PHASES, record->phases);
  }
  hdf5_close(block);
  return failed;
}

static int run_write(const struct hdf5_site *site, hid_t file, const struct store_info *info) {
  hid_t run = hdf5_make_group(site, file, RUN);
  int failed = run < 0 ? site->error->code : store_attributes_write(site, run, info);
  hdf5_close(run);
  return failed;
}

int block_file_make(const char *path, const struct block_record *record, const struct store_info *info, struct hdf5_image *image,
                    struct error *error) {
  struct hdf5_site site = {path, error};
  *image = (struct hdf5_image){0};
  if (record_check(&site, record) || store_attributes_check(&site, info)) return error->code;
  hdf5_enter();
  hid_t file = hdf5_create(&site, image);
  int failed = file < 0 ? error->code : block_write(&site, file, record);
  if (!failed) failed = run_write(&site, file, info);
  if (file >= 0 && hdf5_finish(&site, file, image)) failed = error->code;
  hdf5_leave();
  if (failed) {
    free(image->bytes);
    *image = (struct hdf5_image){0};
  }
  return failed;
}

/* ---- reading ---- */

/* What is in /block, found by one walk. */
struct entry {
  char path[PATH_BYTES];
  bool group;
};

struct block_file {
  struct hdf5_site site; /* path owned; the error of the call at work */
  hid_t file, block;
  int64_t file_bytes;
  int64_t budget_bytes; /* may still be allocated: no honest dataset is larger than its file */
  struct entry *entries;
  size_t count, capacity;
};

static int reader_refuse(const struct block_file *reader, const char *object, const char *what) {
  return error_set(reader->site.error, ERROR_INPUT, "%s: %s: %s; the file is damaged or was not made by this program", reader->site.path,
                   printable(object).text, what);
}

static struct entry *reader_grow(struct block_file *reader) {
  if (reader->count == reader->capacity) {
    size_t capacity = reader->capacity ? 2 * reader->capacity : 64;
    struct entry *grown = realloc(reader->entries, capacity * sizeof *grown);
    if (!grown) {
      error_set(reader->site.error, ERROR_WORK, "%s: out of memory", reader->site.path);
      return NULL;
    }
    reader->entries = grown;
    reader->capacity = capacity;
  }
  return &reader->entries[reader->count++];
}

/* Called by H5Lvisit for each link below /block, before it goes into a group: the limit on the path also limits the depth. */
static herr_t entry_add(hid_t block, const char *path, const H5L_info_t *info, void *data) {
  struct block_file *reader = data;
  if (info->type != H5L_TYPE_HARD) return reader_refuse(reader, path, "is a link to elsewhere"), -1;
  if (strlen(path) >= PATH_BYTES) return reader_refuse(reader, path, "has too long a name"), -1;
  hid_t object = H5Oopen(block, path, H5P_DEFAULT);
  H5I_type_t type = object < 0 ? H5I_BADID : H5Iget_type(object);
  if (object < 0) hdf5_read_failed(&reader->site, path);
  hdf5_close(object);
  if (type != H5I_GROUP && type != H5I_DATASET) return reader_refuse(reader, path, "is neither group nor dataset"), -1;
  struct entry *entry = reader_grow(reader);
  if (!entry) return -1;
  snprintf(entry->path, sizeof entry->path, "%s", path);
  entry->group = type == H5I_GROUP;
  return 0;
}

/* Opens /block of the file, which must be in this file and not a link out of it. */
static int reader_open(struct block_file *reader) {
  reader->block = hdf5_open_group(&reader->site, reader->file, "block");
  if (reader->block < 0) return reader->site.error->code;
  if (H5Lvisit(reader->block, H5_INDEX_NAME, H5_ITER_INC, entry_add, reader) < 0) return hdf5_read_failed(&reader->site, "block");
  return 0;
}

/* The one storage that is written here: chunks with a checksum and nothing else, every one of them there. Anything else could lead to
 * other files, to plug-ins, or to data far larger than the file. */
static bool storage_is_ours(const struct block_file *reader, hid_t dataset, int dimensions, int64_t bytes, size_t size) {
  hid_t creation = H5Dget_create_plist(dataset);
  hsize_t chunk[2] = {1, 1};
  unsigned flags = 0, settings = 0;
  size_t values = 0;
  bool ours = creation >= 0 && H5Pget_layout(creation) == H5D_CHUNKED && H5Pget_chunk(creation, dimensions, chunk) == dimensions &&
              H5Pget_nfilters(creation) == 1 &&
              H5Pget_filter2(creation, 0, &flags, &values, NULL, 0, NULL, &settings) == H5Z_FILTER_FLETCHER32 &&
              chunk[0] <= (hsize_t)reader->file_bytes && chunk[1] <= (hsize_t)reader->file_bytes / (chunk[0] * size) &&
              H5Dget_storage_size(dataset) >= (hsize_t)bytes;
  hdf5_close(creation);
  return ours;
}

/* Checks an open dataset and gives its shape and its bytes. */
static int dataset_check(struct block_file *reader, hid_t dataset, const char *path, enum element element, int *dimensions,
                         int64_t shape[2], int64_t *bytes) {
  hsize_t extent[2] = {1, 1};
  hid_t wanted = element_type(element, false), type = H5Dget_type(dataset), space = H5Dget_space(dataset);
  bool same = wanted >= 0 && type >= 0 && H5Tequal(type, wanted) > 0;
  *dimensions = space < 0 || H5Sget_simple_extent_type(space) != H5S_SIMPLE ? -1 : H5Sget_simple_extent_ndims(space);
  bool plain = (*dimensions == 1 || *dimensions == 2) && H5Sget_simple_extent_dims(space, extent, NULL) == *dimensions;
  hdf5_close(space);
  hdf5_close(type);
  hdf5_close(wanted);
  if (!same || !plain) return reader_refuse(reader, path, "has another type or rank than this program writes");
  if (extent[0] > (hsize_t)MAX_SIZE || extent[1] > (hsize_t)MAX_SIZE ||
      (extent[0] > 0 && extent[1] > (hsize_t)reader->budget_bytes / (extent[0] * element_size(element)))) {
    return reader_refuse(reader, path, "claims more data than the file holds");
  }
  shape[0] = (int64_t)extent[0];
  shape[1] = (int64_t)extent[1];
  *bytes = shape[0] * shape[1] * (int64_t)element_size(element);
  if (*bytes > 0 && !storage_is_ours(reader, dataset, *dimensions, *bytes, element_size(element))) {
    return reader_refuse(reader, path, "is not stored in whole chunks with checksums");
  }
  return 0;
}

/* Reads one dataset into memory of its own; *values stays NULL on failure. */
static int dataset_read(struct block_file *reader, const char *path, enum element element, int *dimensions, int64_t shape[2],
                        void **values) {
  int64_t bytes = 0;
  hid_t memory = -1, dataset = H5Dopen2(reader->block, path, H5P_DEFAULT);
  void *buffer = NULL;
  int failed = dataset < 0 ? hdf5_read_failed(&reader->site, path) : 0;
  if (!failed) failed = dataset_check(reader, dataset, path, element, dimensions, shape, &bytes);
  if (failed) goto done;
  reader->budget_bytes -= bytes;
  buffer = calloc(bytes > 0 ? (size_t)bytes : 1, 1);
  memory = element_type(element, true);
  if (!buffer || memory < 0) {
    failed = error_set(reader->site.error, ERROR_WORK, "%s: out of memory", reader->site.path);
  } else if (bytes > 0 && H5Dread(dataset, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, buffer) < 0) {
    failed = hdf5_read_failed(&reader->site, path);
  }
done:
  hdf5_close(memory);
  hdf5_close(dataset);
  if (failed) {
    free(buffer);
    return failed;
  }
  *values = buffer;
  return 0;
}

/* Reads a dataset NAME/PART of a linear, whose shape is known by then. */
static int part_read(struct block_file *reader, const struct quantized_linear *linear, const char *part, enum element element, int64_t rows,
                     int64_t columns, void **values) {
  char path[PATH_BYTES], message[160];
  int dimensions = 0;
  int64_t shape[2] = {0};
  snprintf(path, sizeof path, "%s/%s", linear->name, part);
  int failed = dataset_read(reader, path, element, &dimensions, shape, values);
  if (failed || (dimensions == 2 && shape[0] == rows && shape[1] == columns)) return failed;
  snprintf(message, sizeof message, "has shape [%lld, %lld] but its linear needs [%lld, %lld]", (long long)shape[0], (long long)shape[1],
           (long long)rows, (long long)columns);
  return reader_refuse(reader, path, message);
}

/* Rows of NAME/codes: the only place that says how many outputs there are. */
static int rows_read(struct block_file *reader, struct quantized_linear *linear) {
  char path[PATH_BYTES];
  int dimensions;
  int64_t shape[2] = {0}, bytes = 0;
  snprintf(path, sizeof path, "%s/codes", linear->name);
  hid_t dataset = H5Dopen2(reader->block, path, H5P_DEFAULT);
  if (dataset < 0) return hdf5_read_failed(&reader->site, path);
  int failed = dataset_check(reader, dataset, path, ELEMENT_U8, &dimensions, shape, &bytes);
  hdf5_close(dataset);
  linear->out_features = shape[0];
  return failed;
}

/* A linear's numbers; it has no arrays yet. */
static int linear_describe(struct block_file *reader, const char *name, struct quantized_linear *linear) {
  const struct hdf5_site *site = &reader->site;
  int64_t bits = 0, symmetric = 0;
  memcpy(linear->name, name, strlen(name) + 1); /* fits, says entries_read */
  int failed = hdf5_read_integer(site, reader->block, name, "bits", 2, 8, &bits);
  if (!failed) failed = hdf5_read_integer(site, reader->block, name, "group_size", 1, MAX_SIZE, &linear->group_size);
  if (!failed) failed = hdf5_read_integer(site, reader->block, name, "in_features", 1, MAX_SIZE, &linear->in_features);
  if (!failed) failed = hdf5_read_integer(site, reader->block, name, "symmetric", 0, 1, &symmetric);
  if (!failed) failed = rows_read(reader, linear);
  linear->bits = (int)bits;
  linear->symmetric = symmetric != 0;
  return failed ? failed : linear_check(site, ERROR_INPUT, linear);
}

static int linear_fill(struct block_file *reader, struct quantized_linear *linear) {
  int64_t rows = linear->out_features, groups = linear_groups(linear);
  void *values = NULL;
  int failed = part_read(reader, linear, "codes", ELEMENT_U8, rows, packed_row_bytes(linear->in_features, linear->bits), &values);
  linear->codes = values;
  values = NULL;
  if (!failed) failed = part_read(reader, linear, "scale", ELEMENT_HALF, rows, groups, &values);
  linear->scale = values;
  values = NULL;
  if (!failed) failed = part_read(reader, linear, "zero_point", ELEMENT_U8, rows, groups, &values);
  linear->zero_point = values;
  return failed ? failed : values_check(&reader->site, ERROR_INPUT, linear);
}

static int array_read(struct block_file *reader, const char *path, const char *name, struct named_array *array) {
  void *values = NULL;
  memcpy(array->name, name, strlen(name) + 1); /* fits, says entries_read */
  int failed = dataset_read(reader, path, ELEMENT_F32, &array->dimensions, array->shape, &values);
  array->values = values;
  return failed;
}

static int timing_read(struct block_file *reader, struct block_record *record) {
  char *phases = NULL;
  int failed = array_read(reader, TIMING, TIMING, &record->timing);
  if (!failed) failed = hdf5_read_text(&reader->site, reader->block, TIMING, PHASES, &phases);
  if (!failed && strlen(phases) >= sizeof record->phases) failed = reader_refuse(reader, TIMING, "names too many phases");
  if (!failed) snprintf(record->phases, sizeof record->phases, "%s", phases);
  free(phases);
  return failed ? failed : timing_check(&reader->site, ERROR_INPUT, record);
}

/* What an entry of /block is to the record. */
enum part { PART_NONE, PART_LINEAR, PART_FOLDED, PART_CALIBRATION, PART_TIMING, PARTS };

static enum part entry_part(const struct entry *entry) {
  size_t prefix = sizeof CALIBRATION - 1;
  if (strncmp(entry->path, CALIBRATION, prefix) == 0 && entry->path[prefix] == '/') return entry->group ? PART_NONE : PART_CALIBRATION;
  if (strchr(entry->path, '/') || strcmp(entry->path, CALIBRATION) == 0) return PART_NONE;
  if (!entry->group && strcmp(entry->path, TIMING) == 0) return PART_TIMING;
  return entry->group ? PART_LINEAR : PART_FOLDED;
}

/* Reads the parts of the walk that are wanted. Counts grow as entries are read, so that a record half read can be freed. */
static int entries_read(struct block_file *reader, struct block_record *record, bool calibration) {
  int failed = 0;
  for (size_t i = 0; i < reader->count && !failed; i++) {
    const char *path = reader->entries[i].path;
    enum part part = entry_part(&reader->entries[i]);
    const char *name = part == PART_CALIBRATION ? path + sizeof CALIBRATION : path;
    if (part == PART_NONE || (part == PART_CALIBRATION) != calibration) continue;
    if (strlen(name) >= sizeof record->linear->name) return reader_refuse(reader, path, "has too long a name");
    if (part == PART_LINEAR) failed = linear_describe(reader, name, &record->linear[record->linears++]);
    if (part == PART_FOLDED) failed = array_read(reader, path, name, &record->folded[record->folded_arrays++]);
    if (part == PART_CALIBRATION) failed = array_read(reader, path, name, &record->calibration[record->calibration_arrays++]);
    if (part == PART_TIMING) failed = timing_read(reader, record);
  }
  return failed;
}

/* Room for everything that the walk found. */
static int record_allocate(const struct block_file *reader, struct block_record *record) {
  size_t counts[PARTS] = {0};
  for (size_t i = 0; i < reader->count; i++) counts[entry_part(&reader->entries[i])]++;
  record->linear = calloc(counts[PART_LINEAR] + 1, sizeof *record->linear);
  record->folded = calloc(counts[PART_FOLDED] + 1, sizeof *record->folded);
  record->calibration = calloc(counts[PART_CALIBRATION] + 1, sizeof *record->calibration);
  if (record->linear && record->folded && record->calibration) return 0;
  return error_set(reader->site.error, ERROR_WORK, "%s: out of memory", reader->site.path);
}

/* Files made before there was this attribute have no experts. */
static int untrained_read(struct block_file *reader, int *untrained) {
  static const char name[] = "untrained_experts";
  int64_t value = 0;
  int failed = 0;
  if (hdf5_has_attribute(reader->block, name)) failed = hdf5_read_integer(&reader->site, reader->block, ".", name, 0, MAX_EXPERTS, &value);
  *untrained = (int)value;
  return failed;
}

static int attributes_read(struct block_file *reader, int index, struct block_record *record) {
  const struct hdf5_site *site = &reader->site;
  hid_t block = reader->block;
  int64_t stored = 0, world = 0;
  char *kept = NULL;
  int failed = hdf5_read_integer(site, block, ".", "index", index, index, &stored);
  if (!failed) failed = hdf5_read_real(site, block, ".", "loss_rtn", &record->loss_rtn);
  if (!failed) failed = hdf5_read_real(site, block, ".", "loss_start", &record->loss_start);
  if (!failed) failed = hdf5_read_real(site, block, ".", "loss_end", &record->loss_end);
  if (!failed) failed = hdf5_read_text(site, block, ".", "kept", &kept);
  if (!failed) failed = hdf5_read_integer(site, block, ".", "skipped_steps", 0, INT64_MAX, &record->skipped_steps);
  if (!failed) failed = untrained_read(reader, &record->untrained_experts);
  if (!failed) failed = hdf5_read_real(site, block, ".", "seconds", &record->seconds);
  if (!failed) failed = hdf5_read_integer(site, block, ".", "world_size", 1, MAX_WORLD, &world);
  if (!failed && !kept_is_known(kept)) {
    failed = reader_refuse(reader, "attribute kept", "is none of rtn, start, end");
  }
  if (!failed) snprintf(record->kept, sizeof record->kept, "%s", kept);
  record->index = index;
  record->world_size = (int)world;
  free(kept);
  return failed;
}

/* Files of earlier versions do not say of which run they are. */
static int run_read(const struct hdf5_site *site, hid_t file, struct store_info *info) {
  if (H5Lexists(file, RUN, H5P_DEFAULT) == 0) return 0;
  hid_t run = hdf5_open_group(site, file, RUN);
  int failed = run < 0 ? site->error->code : store_attributes_read(site, run, info);
  hdf5_close(run);
  return failed;
}

int block_file_read_info(const char *path, struct store_info *info, struct error *error) {
  struct hdf5_site site = {path, error};
  int64_t bytes;
  *info = (struct store_info){0};
  hdf5_enter();
  hid_t file = hdf5_open(&site, &bytes);
  int failed = file < 0 ? error->code : run_read(&site, file, info);
  hdf5_close(file);
  hdf5_leave();
  if (failed) store_info_free(info);
  return failed;
}

static int record_open(struct block_file *reader, int index, struct block_record *record, struct store_info *info) {
  reader->file = hdf5_open(&reader->site, &reader->file_bytes);
  reader->budget_bytes = reader->file_bytes;
  int failed = reader->file < 0 ? reader->site.error->code : run_read(&reader->site, reader->file, info);
  if (!failed) failed = reader_open(reader);
  if (!failed) failed = attributes_read(reader, index, record);
  if (!failed) failed = record_allocate(reader, record);
  return failed ? failed : entries_read(reader, record, false);
}

int block_file_open(const char *path, int index, struct block_file **file, struct block_record *record, struct store_info *info,
                    struct error *error) {
  struct block_file *reader = *file = calloc(1, sizeof *reader);
  *info = (struct store_info){0};
  *record = (struct block_record){0};
  if (reader) *reader = (struct block_file){.site = {strdup(path), error}, .file = -1, .block = -1};
  if (!reader || !reader->site.path) {
    error_set(error, ERROR_WORK, "%s: out of memory", path);
  } else {
    hdf5_enter();
    record_open(reader, index, record, info);
    hdf5_leave();
  }
  if (!error->code) return 0;
  block_file_close(reader);
  *file = NULL;
  block_record_free(record);
  store_info_free(info);
  return error->code;
}

int block_file_read_linear(struct block_file *reader, struct quantized_linear *linear, struct error *error) {
  reader->site.error = error;
  reader->budget_bytes = reader->file_bytes;
  hdf5_enter();
  int failed = linear_fill(reader, linear);
  hdf5_leave();
  if (failed) quantized_linear_free(linear);
  return failed;
}

int block_file_read_calibration(struct block_file *reader, struct block_record *record, struct error *error) {
  reader->site.error = error;
  reader->budget_bytes = reader->file_bytes;
  hdf5_enter();
  int failed = entries_read(reader, record, true);
  hdf5_leave();
  return failed;
}

void block_file_close(struct block_file *reader) {
  if (!reader) return;
  hdf5_enter();
  hdf5_close(reader->block);
  hdf5_close(reader->file);
  hdf5_leave();
  free(reader->entries);
  free((char *)reader->site.path);
  free(reader);
}

void quantized_linear_free(struct quantized_linear *linear) {
  free(linear->codes);
  free(linear->scale);
  free(linear->zero_point);
  linear->codes = linear->zero_point = NULL;
  linear->scale = NULL;
}

static void free_contents(struct block_record *record) {
  for (int i = 0; i < record->linears; i++) quantized_linear_free(&record->linear[i]);
  for (int i = 0; i < record->folded_arrays; i++) free(record->folded[i].values);
  for (int i = 0; i < record->calibration_arrays; i++) free(record->calibration[i].values);
  free(record->timing.values);
}

void block_record_free(struct block_record *record) {
  if (!record->lent) free_contents(record);
  free(record->linear);
  free(record->folded);
  free(record->calibration);
  *record = (struct block_record){0};
}
