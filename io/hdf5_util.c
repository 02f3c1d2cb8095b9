/* hdf5_util.c: the shared idioms around the HDF5 library. */
#include "hdf5_util.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "printable.h"

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
  struct stat status;
  if (stat(site->path, &status) != 0) {
    error_set(site->error, ERROR_INPUT, "%s: %s", site->path, strerror(errno));
    return -1;
  }
  if (!S_ISREG(status.st_mode)) {
    error_set(site->error, ERROR_INPUT, "%s: is not a regular file", site->path);
    return -1;
  }
  hid_t access = access_make();
  hid_t file = access < 0 ? -1 : H5Fopen(site->path, H5F_ACC_RDONLY, access);
  if (file < 0) {
    struct printable reason = reason_find();
    error_set(site->error, ERROR_INPUT, "%s: is not an HDF5 file, or damaged: %s", site->path, reason.text);
  }
  hdf5_close(access);
  *bytes = (int64_t)status.st_size;
  return file;
}

hid_t hdf5_create(const struct hdf5_site *site) {
  hid_t access = access_make(), file = -1;
  if (access >= 0 && H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110) >= 0) {
    file = H5Fcreate(site->path, H5F_ACC_TRUNC, H5P_DEFAULT, access);
  }
  if (file < 0) hdf5_write_failed(site, NULL);
  hdf5_close(access);
  return file;
}

int hdf5_finish(const struct hdf5_site *site, hid_t file) {
  if (H5Fflush(file, H5F_SCOPE_LOCAL) < 0) {
    hdf5_write_failed(site, NULL);
    H5Fclose(file);
    return site->error->code;
  }
  return H5Fclose(file) < 0 ? hdf5_write_failed(site, NULL) : 0;
}

void hdf5_close(hid_t id) {
  if (id >= 0) H5Idec_ref(id);
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

int hdf5_write_text(const struct hdf5_site *site, hid_t base, const char *where, const char *name, const char *value) {
  hid_t type = H5Tcopy(H5T_C_S1);
  int failed = type < 0 || H5Tset_size(type, H5T_VARIABLE) < 0 || H5Tset_cset(type, H5T_CSET_UTF8) < 0;
  failed = failed ? hdf5_write_failed(site, name) : attribute_write(site, base, where, name, type, type, &value);
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
              (wanted == H5T_STRING ? H5Tis_variable_str(*type) > 0 : H5Tget_size(*type) <= 8);
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
  char *text = NULL;
  hid_t type, attribute = attribute_open(site, base, where, name, H5T_STRING, &type);
  int failed = 0;
  *value = NULL;
  if (attribute < 0) return site->error->code;
  if (H5Aread(attribute, type, &text) < 0) {
    failed = hdf5_read_failed(site, attribute_name(where, name).text);
  } else {
    *value = strdup(text ? text : "");
    if (!*value) failed = error_set(site->error, ERROR_WORK, "%s: out of memory", site->path);
    H5free_memory(text);
  }
  hdf5_close(type);
  hdf5_close(attribute);
  return failed;
}
