/* setting.c: reading settings from text by their table row, and finding them by name. */
#include "setting.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "printable.h"

#define NAME_MAX_LENGTH 63 /* longer names are nobody's typing mistake */

static void *field(void *target, const struct setting *setting) {
  return (char *)target + setting->offset;
}

static int set_int(void *target, const struct setting *setting, const char *text, const char *origin, struct error *error) {
  char *end;
  const char *digits = text + (*text == '-');
  if (*digits < '0' || *digits > '9' || digits[strspn(digits, "0123456789")] != '\0')
    return error_set(error, ERROR_INPUT, "%s: '%s' is not a whole number", origin, printable(text).text);
  errno = 0;
  long long value = strtoll(text, &end, 10);
  if (errno == ERANGE || (double)value < setting->min || (double)value > setting->max)
    return error_set(error, ERROR_INPUT, "%s: %s is not in %.0f..%.0f", origin, printable(text).text, setting->min, setting->max);
  if (setting->type == SETTING_INT)
    *(int *)field(target, setting) = (int)value;
  else
    *(int64_t *)field(target, setting) = value;
  return 0;
}

static int set_real(void *target, const struct setting *setting, const char *text, const char *origin, struct error *error) {
  char *end = NULL;
  double value = strtod(text, &end);
  /* strtod also reads blanks, hexadecimal, "inf" and "nan": the characters are checked first. */
  bool number = *text != '\0' && text[strspn(text, "0123456789+-.eE")] == '\0' && *end == '\0';
  if (!number) return error_set(error, ERROR_INPUT, "%s: '%s' is not a number", origin, printable(text).text);
  if (!(value >= setting->min && value <= setting->max))
    return error_set(error, ERROR_INPUT, "%s: %s is not in %g..%g", origin, printable(text).text, setting->min, setting->max);
  *(double *)field(target, setting) = value;
  return 0;
}

static int set_bool(void *target, const struct setting *setting, const char *text, const char *origin, struct error *error) {
  bool value = strcmp(text, "true") == 0;
  if (!value && strcmp(text, "false") != 0)
    return error_set(error, ERROR_INPUT, "%s: '%s' is not true or false", origin, printable(text).text);
  *(bool *)field(target, setting) = value;
  return 0;
}

static int set_enum(void *target, const struct setting *setting, const char *text, const char *origin, struct error *error) {
  int length;
  const char *choice;
  for (int value = 0; (choice = setting_choice(setting, value, &length)) != NULL; value++) {
    if (strncmp(choice, text, (size_t)length) != 0 || text[length] != '\0') continue;
    *(int *)field(target, setting) = value;
    return 0;
  }
  return error_set(error, ERROR_INPUT, "%s: '%s' is not one of %s", origin, printable(text).text, setting->choices);
}

static int add_text(void *target, const struct setting *setting, const char *text, const char *origin, struct error *error) {
  struct setting_texts *texts = field(target, setting);
  if (texts->count == SETTING_MAX_TEXTS) return error_set(error, ERROR_INPUT, "%s: given more than %d times", origin, SETTING_MAX_TEXTS);
  texts->text[texts->count++] = text;
  return 0;
}

size_t setting_bytes(const struct setting *setting) {
  static const size_t bytes[] = {[SETTING_INT] = sizeof(int),
                                 [SETTING_INT64] = sizeof(int64_t),
                                 [SETTING_BOOL] = sizeof(bool),
                                 [SETTING_REAL] = sizeof(double),
                                 [SETTING_ENUM] = sizeof(int),
                                 [SETTING_TEXT] = sizeof(const char *),
                                 [SETTING_TEXTS] = sizeof(struct setting_texts)};
  return bytes[setting->type];
}

int setting_set(void *target, const struct setting *setting, const char *text, const char *origin, struct error *error) {
  switch (setting->type) {
  case SETTING_INT:
  case SETTING_INT64:
    return set_int(target, setting, text, origin, error);
  case SETTING_REAL:
    return set_real(target, setting, text, origin, error);
  case SETTING_BOOL:
    return set_bool(target, setting, text, origin, error);
  case SETTING_ENUM:
    return set_enum(target, setting, text, origin, error);
  case SETTING_TEXT:
    if (*text == '\0') return error_set(error, ERROR_INPUT, "%s: is empty", origin);
    *(const char **)field(target, setting) = text;
    return 0;
  case SETTING_TEXTS:
    if (*text == '\0') return error_set(error, ERROR_INPUT, "%s: is empty", origin);
    return add_text(target, setting, text, origin, error);
  }
  return error_set(error, ERROR_WORK, "%s: the table of settings has an unknown type", origin);
}

void setting_reset(void *target, const struct setting *settings, size_t count) {
  struct error error = {0};
  for (size_t i = 0; i < count; i++)
    if (settings[i].fallback != NULL) setting_set(target, &settings[i], settings[i].fallback, settings[i].name, &error);
}

const char *setting_choice(const struct setting *setting, int value, int *length) {
  const char *choice = setting->choices;
  for (; choice != NULL && value > 0; value--) {
    choice = strchr(choice, '|');
    if (choice != NULL) choice++;
  }
  if (choice != NULL) *length = (int)strcspn(choice, "|");
  return choice;
}

const struct setting *setting_find(const struct setting *settings, size_t count, const char *name) {
  for (size_t i = 0; i < count; i++)
    if (strcmp(settings[i].name, name) == 0) return &settings[i];
  return NULL;
}

/* Edit distance: characters to insert, delete or replace to make b of a. */
static size_t distance(const char *a, const char *b) {
  size_t length = strlen(b), row[NAME_MAX_LENGTH + 1]; /* distances of the prefixes of b to the part of a read so far */
  for (size_t j = 0; j <= length; j++) row[j] = j;
  for (size_t i = 1; a[i - 1] != '\0'; i++) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= length; j++) {
      size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      size_t best = row[j - 1] < row[j] ? row[j - 1] + 1 : row[j] + 1;
      row[j] = replaced < best ? replaced : best;
    }
  }
  return row[length];
}

const struct setting *setting_nearest(const struct setting *settings, size_t count, const char *name) {
  const struct setting *nearest = NULL;
  if (strlen(name) > NAME_MAX_LENGTH) return NULL;
  size_t best = 1 + (strlen(name) + 2) / 3; /* beyond a third of the letters it is another word */
  for (size_t i = 0; i < count; i++) {
    size_t d = distance(settings[i].name, name);
    if (d >= best) continue;
    best = d;
    nearest = &settings[i];
  }
  return nearest;
}
