/* hdf5_util.c: the shared idioms around the HDF5 library. */
#include "hdf5_util.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "hdf5_check.h"
#include "printable.h"

enum {
  MAX_TEXT_BYTES = 1 << 24, /* of an attribute */
  MAX_ATTRIBUTES = 32,      /* of a group: beyond it HDF5 would move them out of the object's header, into a heap */
  GROWTH_BYTES = 1 << 22    /* by which a file in memory grows */
};

#ifndef H5_HAVE_THREADSAFE
#include <pthread.h>
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
#endif

void hdf5_enter(void) {
#ifndef H5_HAVE_THREADSAFE
  pthread_mutex_lock(&lock);
#endif
  H5Eset_auto2(H5E_DEFAULT, NULL, NULL); /* each thread has an error stack of its own */
}

void hdf5_leave(void) {
#ifndef H5_HAVE_THREADSAFE
  pthread_mutex_unlock(&lock);
#endif
}

/* Takes the reason from the innermost record of the error stack: the system's message if it was a system call that failed. */
static herr_t reason_take(unsigned depth, const H5E_error2_t *record, void *data) {
  static const char key[] = "error message = '";
  struct printable *reason = data;
  if (depth > 0 || !record->desc) return 0;
  const char *system = strstr(record->desc, key);
  *reason = printable(system ? system + sizeof key - 1 : record->desc);
  if (system) reason->text[strcspn(reason->text, "'")] = 0;
  return 0;
}

static struct printable reason_find(void) {
  struct printable reason = printable("no reason given");
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, reason_take, &reason);
  return reason;
}

int hdf5_write_failed(const struct hdf5_site *site, const char *object) {
  struct printable reason = reason_find();
  return error_set(site->error, ERROR_WORK, "%s: %s%scannot be written: %s", site->path, object ? printable(object).text : "",
                   object ? ": " : "", reason.text);
}

int hdf5_read_failed(const struct hdf5_site *site, const char *object) {
  struct printable reason = reason_find();
  return error_set(site->error, ERROR_INPUT, "%s: %s%scannot be read: %s; the file is damaged or was not made by this program", site->path,
                   object ? printable(object).text : "", object ? ": " : "", reason.text);
}

/* Access properties: no lock files are taken (a file in writing has a temporary name, and some cluster file systems refuse locks). */
static hid_t access_make(void) {
  hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  if (access >= 0) H5Pset_file_locking(access, false, true);
  return access;
}

hid_t hdf5_open(const struct hdf5_site *site, int64_t *bytes) {
  if (hdf5_check(site, bytes)) return -1; /* the library would not stand what strangers write */
  hid_t access = access_make();
  hid_t file = access < 0 ? -1 : H5Fopen(site->path, H5F_ACC_RDONLY, access);
  if (file < 0) {
    struct printable reason = reason_find();
    error_set(site->error, ERROR_INPUT, "%s: is not an HDF5 file, or damaged: %s", site->path, reason.text);
  }
  hdf5_close(access);
  return file;
}

/* Callbacks of HDF5's memory driver, by which the file's bytes stay ours when it is closed: no second copy of a large block. */
static void *image_grow(void *bytes, size_t length, H5FD_file_image_op_t operation, void *image) {
  (void)operation, (void)image;
  return realloc(bytes, length);
}

static herr_t image_keep(void *bytes, H5FD_file_image_op_t operation, void *data) {
  struct hdf5_image *image = data;
  if (operation == H5FD_FILE_IMAGE_OP_FILE_CLOSE) {
    image->bytes = bytes;
  } else {
    free(bytes);
  }
  return 0;
}

static void *image_same(void *image) {
  return image;
}

static herr_t image_leave(void *image) {
  (void)image;
  return 0;
}

hid_t hdf5_create(const struct hdf5_site *site, struct hdf5_image *image) {
  char nowhere[64]; /* HDF5 would open, and read, a file that is there, and takes two of one name for one */
  snprintf(nowhere, sizeof nowhere, "/dev/null/%p", (void *)image);
  H5FD_file_image_callbacks_t callbacks = {
      .image_realloc = image_grow, .image_free = image_keep, .udata_copy = image_same, .udata_free = image_leave, .udata = image};
  hid_t access = access_make(), file = -1;
  *image = (struct hdf5_image){0};
  if (access >= 0 && H5Pset_fapl_core(access, GROWTH_BYTES, false) >= 0 && H5Pset_file_image_callbacks(access, &callbacks) >= 0 &&
      H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110) >= 0) {
    file = H5Fcreate(nowhere, H5F_ACC_TRUNC, H5P_DEFAULT, access);
  }
  if (file < 0) hdf5_write_failed(site, NULL);
  hdf5_close(access);
  return file;
}

int hdf5_finish(const struct hdf5_site *site, hid_t file, struct hdf5_image *image) {
  int failed = 0;
  ssize_t length = H5Fflush(file, H5F_SCOPE_LOCAL) < 0 ? -1 : H5Fget_file_image(file, NULL, 0);
  if (length <= 0) failed = hdf5_write_failed(site, NULL);
  if (H5Fclose(file) < 0 && !failed) failed = hdf5_write_failed(site, NULL);
  image->length = failed ? 0 : (size_t)length;
  return failed;
}

void hdf5_close(hid_t id) {
  if (id >= 0) H5Idec_ref(id);
}

hid_t hdf5_make_group(const struct hdf5_site *site, hid_t base, const char *name) {
  hid_t creation = H5Pcreate(H5P_GROUP_CREATE), group = -1;
  if (creation >= 0 && H5Pset_attr_phase_change(creation, MAX_ATTRIBUTES, 0) >= 0)
    group = H5Gcreate2(base, name, H5P_DEFAULT, creation, H5P_DEFAULT);
  if (group < 0) hdf5_write_failed(site, name);
  hdf5_close(creation);
  return group;
}

hid_t hdf5_open_group(const struct hdf5_site *site, hid_t base, const char *name) {
  H5L_info_t info;
  hid_t group = -1;
  if (H5Lget_info(base, name, &info, H5P_DEFAULT) < 0 || info.type != H5L_TYPE_HARD) {
    error_set(site->error, ERROR_INPUT, "%s: %s: there is no such group; the file is damaged or was not made by this program", site->path,
              name);
    return -1;
  }
  group = H5Gopen2(base, name, H5P_DEFAULT);
  if (group < 0) hdf5_read_failed(site, name);
  return group;
}

bool hdf5_has_attribute(hid_t base, const char *name) {
  return H5Aexists(base, name) > 0;
}

/* The attribute as a message names it. */
static struct printable attribute_name(const char *where, const char *name) {
  char text[sizeof(struct printable)];
  bool base = strcmp(where, ".") == 0;
  snprintf(text, sizeof text, "%s%sattribute %s", base ? "" : where, base ? "" : ": ", name);
  return printable(text);
}

static int attribute_write(const struct hdf5_site *site, hid_t base, const char *where, const char *name, hid_t file_type,
                           hid_t memory_type, const void *value) {
  hid_t space = H5Screate(H5S_SCALAR), attribute = -1;
  if (space >= 0) attribute = H5Acreate_by_name(base, where, name, file_type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  int failed = attribute < 0 || H5Awrite(attribute, memory_type, value) < 0;
  if (failed) failed = hdf5_write_failed(site, attribute_name(where, name).text);
  hdf5_close(attribute);
  hdf5_close(space);
  return failed;
}

int hdf5_write_integer(const struct hdf5_site *site, hid_t base, const char *where, const char *name, int64_t value) {
  return attribute_write(site, base, where, name, H5T_STD_I64LE, H5T_NATIVE_INT64, &value);
}

int hdf5_write_real(const struct hdf5_site *site, hid_t base, const char *where, const char *name, double value) {
  return attribute_write(site, base, where, name, H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, &value);
}

/* Text has a fixed length: HDF5 keeps variable-length strings in a heap without checksums, where one damaged byte can send it into an
 * endless loop. */
int hdf5_write_text(const struct hdf5_site *site, hid_t base, const char *where, const char *name, const char *value) {
  hid_t type = H5Tcopy(H5T_C_S1);
  int failed = type < 0 || H5Tset_size(type, strlen(value) + 1) < 0 || H5Tset_cset(type, H5T_CSET_UTF8) < 0;
  failed = failed ? hdf5_write_failed(site, name) : attribute_write(site, base, where, name, type, type, value);
  hdf5_close(type);
  return failed;
}

/* Opens a scalar attribute of the wanted class; *type receives its type. */
static hid_t attribute_open(const struct hdf5_site *site, hid_t base, const char *where, const char *name, H5T_class_t wanted,
                            hid_t *type) {
  struct printable label = attribute_name(where, name);
  hid_t attribute = H5Aopen_by_name(base, where, name, H5P_DEFAULT, H5P_DEFAULT), space = -1;
  *type = -1;
  if (attribute < 0) {
    error_set(site->error, ERROR_INPUT, "%s: %s: is missing; the file is damaged or was not made by this program", site->path, label.text);
    return -1;
  }
  *type = H5Aget_type(attribute);
  space = H5Aget_space(attribute);
  bool good = *type >= 0 && space >= 0 && H5Sget_simple_extent_type(space) == H5S_SCALAR && H5Tget_class(*type) == wanted &&
              (wanted == H5T_STRING ? H5Tis_variable_str(*type) == 0 && H5Tget_size(*type) <= MAX_TEXT_BYTES : H5Tget_size(*type) <= 8);
  hdf5_close(space);
  if (good) return attribute;
  error_set(site->error, ERROR_INPUT, "%s: %s: is of another type than this program writes", site->path, label.text);
  hdf5_close(*type);
  hdf5_close(attribute);
  return -1;
}

static int attribute_read(const struct hdf5_site *site, hid_t base, const char *where, const char *name, H5T_class_t wanted,
                          hid_t memory_type, void *value) {
  hid_t type, attribute = attribute_open(site, base, where, name, wanted, &type);
  if (attribute < 0) return site->error->code;
  int failed = H5Aread(attribute, memory_type, value) < 0 ? hdf5_read_failed(site, attribute_name(where, name).text) : 0;
  hdf5_close(type);
  hdf5_close(attribute);
  return failed;
}

int hdf5_read_integer(const struct hdf5_site *site, hid_t base, const char *where, const char *name, int64_t min, int64_t max,
                      int64_t *value) {
  int failed = attribute_read(site, base, where, name, H5T_INTEGER, H5T_NATIVE_INT64, value);
  if (failed || (*value >= min && *value <= max)) return failed;
  return error_set(site->error, ERROR_INPUT, "%s: %s: is %lld but must be in %lld..%lld", site->path, attribute_name(where, name).text,
                   (long long)*value, (long long)min, (long long)max);
}

int hdf5_read_real(const struct hdf5_site *site, hid_t base, const char *where, const char *name, double *value) {
  return attribute_read(site, base, where, name, H5T_FLOAT, H5T_NATIVE_DOUBLE, value);
}

int hdf5_read_text(const struct hdf5_site *site, hid_t base, const char *where, const char *name, char **value) {
  hid_t type, attribute = attribute_open(site, base, where, name, H5T_STRING, &type);
  int failed = 0;
  *value = NULL;
  if (attribute < 0) return site->error->code;
  char *text = calloc(H5Tget_size(type) + 1, 1); /* with an end, whether or not the file has one */
  if (!text) {
    failed = error_set(site->error, ERROR_WORK, "%s: out of memory", site->path);
  } else if (H5Aread(attribute, type, text) < 0) {
    failed = hdf5_read_failed(site, attribute_name(where, name).text);
  }
  hdf5_close(type);
  hdf5_close(attribute);
  if (failed) {
    free(text);
    return failed;
  }
  *value = text;
  return 0;
}
