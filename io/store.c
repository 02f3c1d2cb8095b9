/* store.c: the folder of a run: its master file, and block files that appear whole or not at all.
 * The master is small, so it too is written anew and renamed each time: no moment exists at which it is damaged. */
#include "store.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "block_file.h"
#include "file.h"
#include "hdf5_util.h"
#include "printable.h"

enum { VERSION = 1, MAX_BLOCKS = 10000 }; /* block files are named by four digits */

static const char FORMAT[] = "omniquant", MASTER[] = "omniquant.h5", BLOCK_GROUP[] = "/block";

struct store {
  char *folder;
  struct store_info info;
  char *recipe, *model_config; /* what info points to */
  bool created;                /* the master file, by store_create */
  size_t made;                 /* what folder_make made */
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

/* ---- files ---- */

/* Gives a temporary file, which is on the disk by now, its name: a crash leaves either the old file or the whole new one. */
static int file_commit(const char *temporary, const char *path, const char *folder, struct error *error) {
  if (rename(temporary, path) != 0) {
    error_set(error, ERROR_WORK, "%s: cannot be named: %s", path, strerror(errno));
    unlink(temporary);
    return error->code;
  }
  int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC), failed = 0;
  if (fd < 0 || (fsync(fd) != 0 && errno != EINVAL)) { /* EINVAL: a file system that cannot sync folders */
    failed = error_set(error, ERROR_WORK, "%s: cannot be written to disk: %s", folder, strerror(errno));
  }
  if (fd >= 0) close(fd);
  return failed;
}

/* ---- the master file ---- */

/* JSON text that later readers will parse. */
static int json_check(const struct hdf5_site *site, const char *name, const char *text) {
  json_error_t where;
  json_t *value = json_loads(text, 0, &where);
  bool good = json_is_object(value);
  json_decref(value);
  if (good) return 0;
  return error_set(site->error, ERROR_INPUT, "%s: attribute %s: is not a JSON object", site->path, name);
}

static int info_check(const struct hdf5_site *site, const struct store_info *info) {
  size_t digits = strspn(info->tokens_sha256, "0123456789abcdef");
  if (info->tokens_sha256[digits] || (digits != 0 && digits != 64)) {
    return error_set(site->error, ERROR_INPUT, "%s: attribute tokens_sha256: is not a SHA-256 in hexadecimal", site->path);
  }
  if (info->blocks < 1 || info->blocks > MAX_BLOCKS) {
    return error_set(site->error, ERROR_INPUT, "%s: attribute blocks: is %d but must be in 1..%d", site->path, info->blocks, MAX_BLOCKS);
  }
  int failed = json_check(site, "recipe", info->recipe);
  return failed ? failed : json_check(site, "model_config", info->model_config);
}

static int info_write(const struct hdf5_site *site, hid_t file, const struct store_info *info) {
  int failed = hdf5_write_text(site, file, ".", "format", FORMAT);
  if (!failed) failed = hdf5_write_integer(site, file, ".", "version", VERSION);
  if (!failed) failed = hdf5_write_text(site, file, ".", "model_type", info->model_type);
  if (!failed) failed = hdf5_write_text(site, file, ".", "recipe", info->recipe);
  if (!failed) failed = hdf5_write_text(site, file, ".", "model_config", info->model_config);
  if (!failed) failed = hdf5_write_text(site, file, ".", "tokens_sha256", info->tokens_sha256);
  if (!failed) failed = hdf5_write_integer(site, file, ".", "blocks", info->blocks);
  return failed;
}

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

static int master_write(const struct store *store, struct error *error) {
  char *path = path_join(store->folder, MASTER, error), *temporary = path_join(store->folder, "omniquant.h5.tmp", error);
  struct hdf5_site site = {temporary, error};
  struct hdf5_image image = {0};
  int failed = error->code;
  if (!path || !temporary) goto done;
  hdf5_enter();
  hid_t file = hdf5_create(&site, &image);
  failed = file < 0 ? error->code : info_write(&site, file, &store->info);
  if (!failed) failed = links_write(&site, file, store);
  if (file >= 0 && hdf5_finish(&site, file, &image)) failed = error->code;
  hdf5_leave();
  if (!failed) failed = hdf5_image_write(&site, &image);
  if (!failed) failed = file_commit(temporary, path, store->folder, error);
done:
  free(image.bytes);
  free(temporary);
  free(path);
  return failed;
}

/* Reads a short text attribute into an array of the given size. */
static int short_text_read(const struct hdf5_site *site, hid_t file, const char *name, char *text, size_t size) {
  char *value = NULL;
  int failed = hdf5_read_text(site, file, ".", name, &value);
  if (!failed && strlen(value) >= size) {
    failed = error_set(site->error, ERROR_INPUT, "%s: attribute %s: is longer than %zu bytes", site->path, name, size - 1);
  }
  if (!failed) snprintf(text, size, "%s", value);
  free(value);
  return failed;
}

static int info_read(const struct hdf5_site *site, hid_t file, struct store *store) {
  struct store_info *info = &store->info;
  char format[sizeof FORMAT];
  int64_t version = 0, blocks = 0;
  int failed = short_text_read(site, file, "format", format, sizeof format);
  if (!failed && strcmp(format, FORMAT) != 0) {
    failed = error_set(site->error, ERROR_INPUT, "%s: attribute format: is '%s', not '%s'; not a store of this program", site->path,
                       printable(format).text, FORMAT);
  }
  if (!failed) failed = hdf5_read_integer(site, file, ".", "version", INT64_MIN, INT64_MAX, &version);
  if (!failed && version != VERSION) {
    failed =
        error_set(site->error, ERROR_INPUT, "%s: attribute version: is %lld but this program reads version %d; use the one that made it",
                  site->path, (long long)version, VERSION);
  }
  if (!failed) failed = short_text_read(site, file, "model_type", info->model_type, sizeof info->model_type);
  if (!failed) failed = short_text_read(site, file, "tokens_sha256", info->tokens_sha256, sizeof info->tokens_sha256);
  if (!failed) failed = hdf5_read_integer(site, file, ".", "blocks", 1, MAX_BLOCKS, &blocks);
  if (!failed) failed = hdf5_read_text(site, file, ".", "recipe", &store->recipe);
  if (!failed) failed = hdf5_read_text(site, file, ".", "model_config", &store->model_config);
  info->blocks = (int)blocks;
  info->recipe = store->recipe;
  info->model_config = store->model_config;
  return failed ? failed : info_check(site, info);
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
  H5L_info_t info;
  int failed = 0;
  if (H5Lget_info(file, "blocks", &info, H5P_DEFAULT) < 0 || info.type != H5L_TYPE_HARD) {
    return error_set(site->error, ERROR_INPUT, "%s: blocks: there is no such group; the file is damaged or was not made by this program",
                     site->path);
  }
  hid_t group = H5Gopen2(file, "blocks", H5P_DEFAULT);
  if (group < 0 || H5Literate(group, H5_INDEX_NAME, H5_ITER_INC, NULL, link_check, &check) < 0) failed = hdf5_read_failed(site, "blocks");
  hdf5_close(group);
  return failed;
}

static int master_read(struct store *store, struct error *error) {
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
  int failed = file < 0 ? error->code : info_read(&site, file, store);
  if (!failed) failed = links_check(&site, file, store->info.blocks);
  hdf5_close(file);
  hdf5_leave();
  free(path);
  return failed;
}

/* ---- the folder ---- */

/* Only an empty folder is taken: nobody's files are mixed with ours. */
static int folder_check_empty(const char *folder, struct error *error) {
  struct dirent *entry;
  struct printable other = {""};
  bool run = false;
  DIR *stream = opendir(folder);
  if (!stream) return error_set(error, ERROR_INPUT, "%s: cannot be used as output: %s; choose another --output", folder, strerror(errno));
  while ((entry = readdir(stream))) {
    if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
    if (strcmp(entry->d_name, MASTER) == 0) run = true;
    other = printable(entry->d_name);
  }
  closedir(stream);
  if (run) {
    return error_set(error, ERROR_INPUT, "%s: holds another run (%s); choose another --output or remove it", folder, MASTER);
  }
  if (!other.text[0]) return 0;
  return error_set(error, ERROR_INPUT, "%s: is not empty (holds %s); choose another --output or remove it", folder, other.text);
}

/* Makes the folder and those above it. *made: bytes of the path to the first that was not there before, 0 for none. */
static int folder_make(const char *folder, size_t *made, struct error *error) {
  char *path = strdup(folder);
  int failed = path ? 0 : error_set(error, ERROR_WORK, "%s: out of memory", folder);
  *made = 0;
  for (size_t i = 1; !failed && i <= strlen(folder); i++) {
    if (folder[i] != '/' && folder[i] != 0) continue;
    path[i] = 0;
    if (mkdir(path, 0777) == 0) {
      if (!*made) *made = i;
    } else if (errno != EEXIST) {
      failed = error_set(error, ERROR_INPUT, "%s: cannot be made: %s; choose another --output", path, strerror(errno));
    }
    path[i] = folder[i];
  }
  free(path);
  return failed;
}

/* Removes the folders that folder_make made, as far as nothing is in them. */
static void folder_unmake(const char *folder, size_t made) {
  char *path = made ? strdup(folder) : NULL;
  for (size_t i = path ? strlen(path) : 0; i >= made && i > 0; i--) {
    if (folder[i] != '/' && folder[i] != 0) continue;
    path[i] = 0;
    if (rmdir(path) != 0) break;
  }
  free(path);
}

static int store_begin(struct store *store, struct error *error) {
  char *blocks = path_join(store->folder, "blocks", error);
  if (!blocks) return error->code;
  int failed = folder_make(store->folder, &store->made, error);
  if (!failed) failed = folder_check_empty(store->folder, error);
  if (failed) {
    folder_unmake(store->folder, store->made);
    goto done;
  }
  if (mkdir(blocks, 0777) != 0) { /* also decides between two that begin at once */
    failed = error_set(error, ERROR_INPUT, "%s: cannot be made: %s; choose another --output", blocks, strerror(errno));
  } else {
    failed = master_write(store, error);
    if (failed) rmdir(blocks);
  }
  if (failed) folder_unmake(store->folder, store->made);
  store->created = !failed;
done:
  free(blocks);
  return failed;
}

/* A store that holds copies of its texts; NULL with the error set. */
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
  if (info_check(&site, info)) return error->code;
  struct store *made = store_new(folder, error);
  if (!made) return error->code;
  made->info = *info;
  made->info.recipe = made->recipe = strdup(info->recipe);
  made->info.model_config = made->model_config = strdup(info->model_config);
  int failed = made->recipe && made->model_config ? 0 : error_set(error, ERROR_WORK, "%s: out of memory", folder);
  if (!failed) failed = store_begin(made, error);
  if (failed) {
    store_close(made, error);
    return failed;
  }
  *store = made;
  return 0;
}

int store_open(const char *folder, struct store **store, struct error *error) {
  *store = NULL;
  struct store *opened = store_new(folder, error);
  if (!opened) return error->code;
  int failed = master_read(opened, error);
  if (failed) {
    store_close(opened, error);
    return failed;
  }
  *store = opened;
  return 0;
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

int block_image_make(struct block_image *image, const struct block_record *record, const char *where, struct error *error) {
  struct hdf5_image file;
  *image = (struct block_image){.index = record->index};
  if (block_file_make(where, record, &file, error)) return error->code;
  image->bytes = file.bytes;
  image->length = file.length;
  return 0;
}

int store_write_block(struct store *store, const struct block_image *image, struct error *error) {
  if (index_check(store, image->index, ERROR_WORK, error)) return error->code;
  char *path = path_join(store->folder, block_name(image->index).text, error), *temporary = NULL;
  char *blocks = path_join(store->folder, "blocks", error);
  if (path && asprintf(&temporary, "%s.tmp", path) < 0) {
    temporary = NULL;
    error_set(error, ERROR_WORK, "%s: out of memory", path);
  }
  int failed = error->code;
  if (path && temporary && blocks) {
    struct hdf5_site site = {temporary, error};
    struct hdf5_image file = {image->bytes, image->length};
    failed = hdf5_image_write(&site, &file);
    if (!failed) failed = file_commit(temporary, path, blocks, error);
  }
  if (!failed) failed = master_write(store, error);
  free(blocks);
  free(temporary);
  free(path);
  return failed;
}

int store_read_block(struct store *store, int index, struct block_record *record, struct error *error) {
  *record = (struct block_record){0};
  if (index_check(store, index, ERROR_INPUT, error)) return error->code;
  char *path = path_join(store->folder, block_name(index).text, error);
  int failed = error->code;
  if (path && !store_has_block(store, index)) {
    failed = error_set(error, ERROR_INPUT, "%s: is not there: block %d was not calibrated, or not to its end", path, index);
  } else if (path) {
    failed = block_file_read(path, index, record, error);
  }
  free(path);
  return failed;
}

void store_abandon(const struct store *store) {
  struct error ignored = {0};
  if (!store || !store->created) return;
  for (int i = 0; i < store->info.blocks; i++)
    if (store_has_block(store, i)) return;
  char *blocks = path_join(store->folder, "blocks", &ignored), *master = path_join(store->folder, MASTER, &ignored);
  if (blocks && master && rmdir(blocks) == 0) {
    unlink(master);
    folder_unmake(store->folder, store->made);
  }
  free(master);
  free(blocks);
}

/* Nothing waits to be flushed: every write was synced before it was reported as done. */
int store_close(struct store *store, struct error *error) {
  (void)error;
  if (!store) return 0;
  free(store->recipe);
  free(store->model_config);
  free(store->folder);
  free(store);
  return 0;
}
