/* setting.h: named settings described by a table: one row gives a YAML key, a command-line flag, a range and a line of help, so that the
 * three ways to say a thing cannot drift apart. */
#ifndef OMNIQUANT_SETTING_H
#define OMNIQUANT_SETTING_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"

/* C type of the field: int, int64_t, bool, double, an enum counted from 0, const char *, or struct setting_texts. */
enum setting_type { SETTING_INT, SETTING_INT64, SETTING_BOOL, SETTING_REAL, SETTING_ENUM, SETTING_TEXT, SETTING_TEXTS };

/* The texts of a flag that may be repeated, in their order. */
enum { SETTING_MAX_TEXTS = 16 };
struct setting_texts {
  int count;
  const char *text[SETTING_MAX_TEXTS];
};

/* One setting of a table. */
struct setting {
  const char *name; /* YAML key; the flag is the same with '-' for '_' */
  enum setting_type type;
  size_t offset;        /* of the field in the struct that the table describes */
  double min, max;      /* allowed range of numbers, inclusive; within +-2^53, so that every integer in it is exact */
  const char *choices;  /* of an ENUM, separated by '|', in the order of its values; of TEXT and TEXTS, the word for it in --help */
  const char *fallback; /* default, as written in YAML; NULL for none: a TEXT that must be given, or a flag without its --no- */
  const char *help;     /* one line for --help and the man page */
};

/* Sets all fields of a table to their defaults; those without one stay. */
void setting_reset(void *target, /* struct that the table describes */
                   const struct setting *settings, size_t count);

/* Bytes of the field. */
size_t setting_bytes(const struct setting *setting);

/* Sets one field from text; TEXTS are added to. ERROR_INPUT for the wrong type, trailing characters or a value out of range:
 * "ORIGIN: 9 is not in 2..8"; the field is unchanged then. */
int setting_set(void *target, const struct setting *setting,
                const char *text,   /* as in YAML, or the argument of a flag; TEXT and TEXTS point to it */
                const char *origin, /* where the text stands: "configs/x.yaml:3: wbits" or "--wbits" */
                struct error *error);

/* The setting of that name, or NULL. */
const struct setting *setting_find(const struct setting *settings, size_t count, const char *name);

/* The setting whose name looks most like a mistyped one, or NULL if none is near. */
const struct setting *setting_nearest(const struct setting *settings, size_t count, const char *name);

/* Name of choice `value` of an ENUM; the text is not terminated: *length receives its length. */
const char *setting_choice(const struct setting *setting, int value, int *length);

#endif
