/* store.c: the folder of a run: its master file, and block files that appear whole or not at all.
 * The master is small, so it too is written anew and renamed each time: no moment exists at which it is damaged. */
#include "store.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "block_file.h"
#include "file.h"
#include "hdf5_util.h"
#include "printable.h"
#include "store_attributes.h"

static const char MASTER[] = "omniquant.h5", BLOCKS[] = "blocks", BLOCK_GROUP[] = "/block";

struct store {
  char *folder;
  struct store_info info;  /* its texts are owned */
  struct folder_lock lock; /* of a store that is written */
  bool created;            /* by store_create, not there before */
  size_t made;             /* what folder_make made; 0 for a folder that was there */
};

/* ---- names ---- */

struct block_name {
  char text[32];
};

/* The file of a block, relative to the store: also what the link in the master says. */
static struct block_name block_name(int index) {
  struct block_name name;
  snprintf(name.text, sizeof name.text, "blocks/%04d.h5", index);
  return name;
}

/* ---- the master file ---- */

/* One link a block that is there. */
static int links_write(const struct hdf5_site *site, hid_t file, const struct store *store) {
  hid_t group = H5Gcreate2(file, "blocks", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  if (group < 0) return hdf5_write_failed(site, "blocks");
  int failed = 0;
  for (int i = 0; i < store->info.blocks && !failed; i++) {
    char name[16];
    snprintf(name, sizeof name, "%04d", i);
    if (!store_has_block(store, i)) continue;
    if (H5Lcreate_external(block_name(i).text, BLOCK_GROUP, group, name, H5P_DEFAULT, H5P_DEFAULT) < 0) {
      failed = hdf5_write_failed(site, name);
    }
  }
  hdf5_close(group);
  return failed;
}

/* Makes the file of the present state in memory. */
static int master_make(const struct store *store, const char *path, struct hdf5_image *image, struct error *error) {
  struct hdf5_site site = {path, error};
  hdf5_enter();
  hid_t file = hdf5_create(&site, image);
  int failed = file < 0 ? error->code : store_attributes_write(&site, file, &store->info);
  if (!failed) failed = links_write(&site, file, store);
  if (file >= 0 && hdf5_finish(&site, file, image)) failed = error->code;
  hdf5_leave();
  return failed;
}

static int master_write(const struct store *store, struct error *error) {
  struct hdf5_image image = {0};
  char *path = path_join(store->folder, MASTER, error);
  int failed = path ? master_make(store, path, &image, error) : error->code;
  if (!failed) failed = file_write(path, image.bytes, image.length, error);
  free(image.bytes);
  free(path);
  return failed;
}

struct link_check {
  const struct hdf5_site *site;
  int blocks;
};

/* Called for each member of /blocks: only the very link that links_write makes may be there. */
static herr_t link_check(hid_t group, const char *name, const H5L_info_t *info, void *data) {
  const struct link_check *check = data;
  char value[64];
  const char *file = NULL, *object = NULL;
  unsigned flags;
  long index = strspn(name, "0123456789") == 4 && strlen(name) == 4 ? strtol(name, NULL, 10) : -1;
  if (index >= 0 && index < check->blocks && info->type == H5L_TYPE_EXTERNAL && info->u.val_size <= sizeof value &&
      H5Lget_val(group, name, value, sizeof value, H5P_DEFAULT) >= 0 &&
      H5Lunpack_elink_val(value, info->u.val_size, &flags, &file, &object) >= 0 && strcmp(file, block_name((int)index).text) == 0 &&
      strcmp(object, BLOCK_GROUP) == 0) {
    return 0;
  }
  error_set(check->site->error, ERROR_INPUT, "%s: blocks/%s: is not a link to a block of this folder; do not use this store",
            check->site->path, printable(name).text);
  return -1;
}

static int links_check(const struct hdf5_site *site, hid_t file, int blocks) {
  struct link_check check = {site, blocks};
  hid_t group = hdf5_open_group(site, file, BLOCKS);
  if (group < 0) return site->error->code;
  int failed = H5Literate(group, H5_INDEX_NAME, H5_ITER_INC, NULL, link_check, &check) < 0 ? hdf5_read_failed(site, BLOCKS) : 0;
  hdf5_close(group);
  return failed;
}

/* What the master file says; on failure there is nothing to free. */
static int master_read(const struct store *store, struct store_info *info, struct error *error) {
  char *path = path_join(store->folder, MASTER, error);
  struct hdf5_site site = {path, error};
  int64_t bytes;
  if (!path) return error->code;
  if (access(path, F_OK) != 0) {
    error_set(error, ERROR_INPUT, "%s: %s; give the output folder of omniquant calibrate", path, strerror(errno));
    free(path);
    return error->code;
  }
  hdf5_enter();
  hid_t file = hdf5_open(&site, &bytes);
  int failed = file < 0 ? error->code : store_attributes_read(&site, file, info);
  if (!failed && links_check(&site, file, info->blocks)) {
    store_info_free(info);
    failed = error->code;
  }
  hdf5_close(file);
  hdf5_leave();
  free(path);
  return failed;
}

/* ---- the folder ---- */

static bool has_entry(const struct store *store, const char *name) {
  struct error ignored = {0};
  char *path = path_join(store->folder, name, &ignored);
  bool there = path && access(path, F_OK) == 0;
  free(path);
  return there;
}

/* Only an empty folder is taken: nobody's files are mixed with ours. */
static int folder_check_empty(const struct store *store, struct error *error) {
  struct dirent *entry;
  struct printable other = {""};
  DIR *stream = opendir(store->folder);
  if (!stream)
    return error_set(error, ERROR_INPUT, "%s: cannot be used as output: %s; choose another --output", store->folder, strerror(errno));
  while ((entry = readdir(stream)))
    if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0 && strcmp(entry->d_name, FOLDER_LOCK_NAME) != 0)
      other = printable(entry->d_name);
  closedir(stream);
  if (!other.text[0]) return 0;
  return error_set(error, ERROR_INPUT, "%s: is not empty (holds %s); choose another --output or remove it", store->folder, other.text);
}

static int blocks_make(const struct store *store, struct error *error) {
  char *blocks = path_join(store->folder, BLOCKS, error);
  if (!blocks) return error->code;
  if (mkdir(blocks, 0777) != 0 && errno != EEXIST)
    error_set(error, ERROR_INPUT, "%s: cannot be made: %s; choose another --output", blocks, strerror(errno));
  free(blocks);
  return error->code;
}

/* Removes the folder of blocks and the master, if no block is there. */
static void blocks_unmake(const struct store *store) {
  struct error ignored = {0};
  char *blocks = path_join(store->folder, BLOCKS, &ignored), *master = path_join(store->folder, MASTER, &ignored);
  if (blocks && master && rmdir(blocks) == 0) unlink(master);
  free(master);
  free(blocks);
}

/* The run's attributes from any of its block files: *found. */
static void info_from_blocks(const struct store *store, struct store_info *info, bool *found) {
  struct error ignored = {0};
  char *folder = path_join(store->folder, BLOCKS, &ignored);
  DIR *stream = folder ? opendir(folder) : NULL;
  struct dirent *entry;
  *found = false;
  while (stream && !*found && (entry = readdir(stream))) {
    struct error damaged = {0};
    char *path = path_join(folder, entry->d_name, &damaged);
    if (path && strspn(entry->d_name, "0123456789") == 4 && strcmp(entry->d_name + 4, ".h5") == 0)
      *found = !block_file_read_info(path, info, &damaged) && info->blocks > 0;
    free(path);
  }
  if (stream) closedir(stream);
  free(folder);
}

/* Of which run the folder is, by its master or, if that is damaged or was not written any more, by its blocks. *none: there is nothing yet. */
static int run_find(const struct store *store, struct store_info *info, bool *none, struct error *error) {
  struct error of_master = {0};
  bool found;
  *none = false;
  if (!master_read(store, info, &of_master)) return 0;
  info_from_blocks(store, info, &found);
  if (found) return 0;
  *none = !has_entry(store, MASTER) && !folder_check_empty(store, &(struct error){0});
  return *none ? 0 : error_set(error, of_master.code, "%s", of_master.message);
}

/* Goes on with the run that is there, if it is the same. */
static int run_continue(struct store *store, struct error *error) {
  struct store_info there = {0};
  bool none;
  char difference[200];
  if (run_find(store, &there, &none, error)) return error->code;
  if (!none && !store_info_same(&there, &store->info, difference))
    error_set(error, ERROR_INPUT, "%s: holds another run: %s; choose another --output, or give what that run was given", store->folder,
              difference);
  store->created = none;
  store_info_free(&there);
  return error->code;
}

/* What is left of a start that was cut off: no block, perhaps their folder. */
static void leftovers_remove(const struct store *store) {
  struct error ignored = {0};
  char *blocks = path_join(store->folder, BLOCKS, &ignored);
  folder_sweep(store->folder);
  if (blocks) folder_sweep(blocks);
  if (blocks && !has_entry(store, MASTER)) rmdir(blocks);
  free(blocks);
}

static int store_begin(struct store *store, struct error *error) {
  if (folder_make(store->folder, &store->made, error)) return error->code;
  if (folder_lock(store->folder, &store->lock, error)) return error->code;
  leftovers_remove(store);
  store->created = !has_entry(store, MASTER) && !has_entry(store, BLOCKS);
  int failed = store->created ? folder_check_empty(store, error) : run_continue(store, error);
  if (failed) {
    store->created = false;
    return failed;
  }
  failed = blocks_make(store, error);
  return failed ? failed : master_write(store, error);
}

static struct store *store_new(const char *folder, struct error *error) {
  struct store *store = calloc(1, sizeof *store);
  if (store) store->folder = strdup(folder);
  if (store && store->folder) return store;
  error_set(error, ERROR_WORK, "%s: out of memory", folder);
  store_close(store, error);
  return NULL;
}

int store_create(const char *folder, const struct store_info *info, struct store **store, struct error *error) {
  struct hdf5_site site = {folder, error};
  *store = NULL;
  if (!*folder) return error_set(error, ERROR_INPUT, "--output: is empty; name a folder");
  if (store_attributes_check(&site, info)) return error->code;
  struct store *made = store_new(folder, error);
  if (!made) return error->code;
  if (store_info_copy(&made->info, info, folder, error) || store_begin(made, error)) {
    store_abandon(made);
    store_close(made, error);
    return error->code;
  }
  *store = made;
  return 0;
}

int store_open(const char *folder, struct store **store, struct error *error) {
  *store = NULL;
  struct store *opened = store_new(folder, error);
  if (!opened) return error->code;
  if (master_read(opened, &opened->info, error)) {
    store_close(opened, error);
    return error->code;
  }
  *store = opened;
  return 0;
}

int store_recover(const char *folder, struct store **store, struct error *error) {
  bool found;
  *store = NULL;
  struct store *opened = store_new(folder, error);
  if (!opened) return error->code;
  info_from_blocks(opened, &opened->info, &found);
  if (!found) {
    store_close(opened, error);
    return error_set(error, ERROR_INPUT, "%s: holds no block file that tells of its run; there is nothing to recover", folder);
  }
  *store = opened;
  return 0;
}

int store_repair(struct store *store, struct error *error) {
  if (folder_lock(store->folder, &store->lock, error)) return error->code;
  folder_sweep(store->folder);
  return master_write(store, error);
}

const struct store_info *store_info(const struct store *store) {
  return &store->info;
}

bool store_has_block(const struct store *store, int index) {
  struct error ignored = {0};
  struct stat status;
  if (index < 0 || index >= store->info.blocks) return false;
  char *path = path_join(store->folder, block_name(index).text, &ignored);
  bool there = path && stat(path, &status) == 0 && S_ISREG(status.st_mode);
  free(path);
  return there;
}

static int index_check(const struct store *store, int index, int code, struct error *error) {
  if (index >= 0 && index < store->info.blocks) return 0;
  return error_set(error, code, "%s: block %d: the model has blocks 0..%d", store->folder, index, store->info.blocks - 1);
}

void block_image_free(struct block_image *image) {
  free(image->bytes);
  *image = (struct block_image){0};
}

int block_image_make(struct block_image *image, const struct block_record *record, const struct store_info *info, const char *where,
                     struct error *error) {
  struct hdf5_image file;
  *image = (struct block_image){.index = record->index};
  if (block_file_make(where, record, info, &file, error)) return error->code;
  image->bytes = file.bytes;
  image->length = file.length;
  return 0;
}

int store_write_block(struct store *store, const struct block_image *image, struct error *error) {
  if (index_check(store, image->index, ERROR_WORK, error)) return error->code;
  char *path = path_join(store->folder, block_name(image->index).text, error);
  int failed = path ? file_write(path, image->bytes, image->length, error) : error->code;
  if (!failed) failed = master_write(store, error);
  free(path);
  return failed;
}

/* A block of another run, put into this folder by somebody. */
static int block_check_run(const struct store *store, const char *path, const struct store_info *of_block, struct error *error) {
  char difference[200];
  if (of_block->blocks == 0 || store_info_same(of_block, &store->info, difference)) return 0;
  return error_set(error, ERROR_INPUT, "%s: belongs to another run than %s/%s: %s", path, store->folder, MASTER, difference);
}

/* Opens a block that is there, and that is of this run. */
static int block_open(const struct store *store, const char *path, int index, struct block_file **file, struct block_record *record,
                      struct error *error) {
  struct store_info of_block;
  if (!store_has_block(store, index))
    return error_set(error, ERROR_INPUT, "%s: is not there: block %d was not calibrated, or not to its end", path, index);
  if (block_file_open(path, index, file, record, &of_block, error)) return error->code;
  if (block_check_run(store, path, &of_block, error)) {
    block_file_close(*file);
    *file = NULL;
    block_record_free(record);
  }
  store_info_free(&of_block);
  return error->code;
}

int store_open_block(struct store *store, int index, struct block_file **file, struct block_record *record, struct error *error) {
  *file = NULL;
  *record = (struct block_record){0};
  if (index_check(store, index, ERROR_INPUT, error)) return error->code;
  char *path = path_join(store->folder, block_name(index).text, error);
  if (path) block_open(store, path, index, file, record, error);
  free(path);
  return error->code;
}

int store_read_block(struct store *store, int index, struct block_record *record, struct error *error) {
  struct block_file *file;
  if (store_open_block(store, index, &file, record, error)) return error->code;
  int failed = 0;
  for (int i = 0; i < record->linears && !failed; i++) failed = block_file_read_linear(file, &record->linear[i], error);
  if (!failed) failed = block_file_read_calibration(file, record, error);
  block_file_close(file);
  if (failed) block_record_free(record);
  return failed;
}

bool store_abandon(const struct store *store) {
  if (!store || !store->created) return false;
  for (int i = 0; i < store->info.blocks; i++)
    if (store_has_block(store, i)) return false;
  blocks_unmake(store);
  return true;
}

/* Nothing waits to be flushed: every write was synced before it was reported as done. */
int store_close(struct store *store, struct error *error) {
  if (!store) return error->code;
  folder_unlock(&store->lock);
  if (store->made && !has_entry(store, MASTER)) folder_unmake(store->folder, store->made);
  store_info_free(&store->info);
  free(store->folder);
  free(store);
  return error->code;
}
