/* recipe.c: the table of settings of a calibration, and reading them from YAML into a struct recipe and out of it as JSON. */
#include "recipe.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

#include "printable.h"

#define FILE_LIMIT_BYTES 65536 /* a recipe is a page at most; more is another file given by mistake */

static const struct setting settings[] = {
    {"wbits", SETTING_INT, offsetof(struct recipe, wbits), 2, 8, NULL, "4", "bits a weight"},
    {"group_size", SETTING_INT, offsetof(struct recipe, group_size), 0, 1 << 24, NULL, "0",
     "input columns that share a scale; 0: the whole row (per channel)"},
    {"symmetric", SETTING_BOOL, offsetof(struct recipe, symmetric), 0, 1, NULL, "false", "fix the zero point to the middle code"},
    {"abits", SETTING_INT, offsetof(struct recipe, activations.abits), 2, 16, NULL, "16",
     "bits of the activations that linear layers read; 16: not quantized"},
    {"kv_bits", SETTING_INT, offsetof(struct recipe, activations.kv_bits), 0, 16, NULL, "0",
     "bits of queries, keys and values; 0: as abits"},
    {"act_granularity", SETTING_ENUM, offsetof(struct recipe, activations.granularity), 0, 0, "token|tensor|group", "token",
     "what shares a scale: a token, a whole sample, or act_group_size columns of a token"},
    {"act_group_size", SETTING_INT, offsetof(struct recipe, activations.group_size), 1, 1 << 24, NULL, "128",
     "columns a group of activations, where act_granularity is group"},
    {"kv_granularity", SETTING_ENUM, offsetof(struct recipe, activations.kv_granularity), 0, 0, "head|token", "head",
     "what shares a scale in queries, keys and values: a token's head, or a token"},
    {"lwc", SETTING_BOOL, offsetof(struct recipe, lwc), 0, 1, NULL, "true", "learn the clipping of weights"},
    {"let", SETTING_BOOL, offsetof(struct recipe, let), 0, 1, NULL, "false",
     "learn scales and shifts that move outliers of activations into weights"},
    {"let_up", SETTING_BOOL, offsetof(struct recipe, let_up), 0, 1, NULL, "false",
     "let: scale between the up and down layers too, which the paper does not"},
    {"alpha", SETTING_REAL, offsetof(struct recipe, alpha), 0, 1, NULL, "0.5",
     "let: where scales start: how far outliers move, 0 not at all, 1 all the way"},
    {"aug_loss", SETTING_BOOL, offsetof(struct recipe, aug_loss), 0, 1, NULL, "false",
     "add the loss against the full-precision block on the quantized input"},
    {"lwc_init", SETTING_ENUM, offsetof(struct recipe, lwc_init), 0, 0, "paper|search", "paper",
     "where clipping starts: the paper's constant, or a grid search weighted by activations"},
    {"optimizer", SETTING_ENUM, offsetof(struct recipe, optimizer), 0, 0, "adamw|sign", "adamw",
     "clipping is learned by AdamW, or by sign updates for short runs"},
    {"stored_scale", SETTING_BOOL, offsetof(struct recipe, stored_scale), 0, 1, NULL, "true",
     "train with scales rounded to fp16 as they are stored; false: in fp32, as the paper's code"},
    {"bf16_products", SETTING_BOOL, offsetof(struct recipe, bf16_products), 0, 1, NULL, "false",
     "training steps round inputs of matrix products to bf16 on CPUs that are faster so"},
    {"epochs", SETTING_INT, offsetof(struct recipe, epochs), 0, 1000000, NULL, "20",
     "passes over the samples for each block; 0: round to nearest"},
    {"batch", SETTING_INT, offsetof(struct recipe, batch), 1, 65536, NULL, "1", "samples a step, over all ranks"},
    {"lwc_lr", SETTING_REAL, offsetof(struct recipe, lwc_lr), 0, 100, NULL, "1e-2", "AdamW's learning rate of lwc at batch 1"},
    {"let_lr", SETTING_REAL, offsetof(struct recipe, let_lr), 0, 100, NULL, "5e-3", "AdamW's learning rate of let at batch 1"},
    {"scale_lr", SETTING_BOOL, offsetof(struct recipe, scale_lr), 0, 1, NULL, "true", "multiply AdamW's learning rates by batch"},
    {"sign_span", SETTING_REAL, offsetof(struct recipe, sign_span), 0, 100, NULL, "1",
     "sign updates: a clipping factor, between 0 and 1, can travel half of it in all"},
    {"samples", SETTING_INT, offsetof(struct recipe, samples), 1, 1 << 24, NULL, "128", "calibration samples"},
    {"seqlen", SETTING_INT, offsetof(struct recipe, seqlen), 1, 1 << 24, NULL, "2048", "tokens a sample"},
    {"sampling", SETTING_ENUM, offsetof(struct recipe, sampling), 0, 0, "random|sequential", "random",
     "where samples start in the token file: drawn from seed, or one after the other"},
    {"seed", SETTING_INT64, offsetof(struct recipe, seed), 0, 9007199254740991, NULL, "0", "seed of random sampling"},
};
enum { SETTINGS = sizeof settings / sizeof settings[0] };

const struct setting *recipe_settings(size_t *count) {
  *count = SETTINGS;
  return settings;
}

void recipe_init(struct recipe *recipe) {
  memset(recipe, 0, sizeof *recipe); /* the padding too: a recipe is sent between ranks as bytes */
  setting_reset(recipe, settings, SETTINGS);
}

int recipe_set(struct recipe *recipe, const struct setting *setting, const char *text, const char *origin, struct error *error) {
  return setting_set(recipe, setting, text, origin, error);
}

/* What learns has to have a length of steps. */
static int check_rate(const struct recipe *recipe, bool learned, const char *name, double rate, struct error *error) {
  if (!learned || recipe->epochs == 0 || rate > 0) return 0;
  return error_set(error, ERROR_INPUT, "%s: 0 would learn nothing in %d epochs: raise it, or set epochs to 0", name, recipe->epochs);
}

int recipe_check(const struct recipe *recipe, struct error *error) {
  bool sign = recipe->optimizer == OPTIMIZER_SIGN;
  if (recipe->batch > recipe->samples)
    return error_set(error, ERROR_INPUT, "batch: %d is more than the %d samples: lower batch or raise samples", recipe->batch,
                     recipe->samples);
  if (recipe->activations.kv_bits == 1) return error_set(error, ERROR_INPUT, "kv_bits: 1 is neither 0 (as abits) nor in 2..16");
  if (recipe->let_up && !recipe->let)
    return error_set(error, ERROR_INPUT, "let_up: true is a part of let, which is false: set let to true, or let_up to false");
  if (check_rate(recipe, recipe->lwc && !sign, "lwc_lr", recipe->lwc_lr, error)) return error->code;
  if (check_rate(recipe, recipe->lwc && sign, "sign_span", recipe->sign_span, error)) return error->code;
  return check_rate(recipe, recipe->let, "let_lr", recipe->let_lr, error);
}

bool recipe_same(const struct recipe *a, const struct recipe *b, const struct setting *setting) {
  return memcmp((const char *)a + setting->offset, (const char *)b + setting->offset, setting_bytes(setting)) == 0;
}

/* A recipe file being read. */
struct reader {
  const char *path;
  char *text; /* the whole file */
  size_t bytes;
  yaml_parser_t parser;
};

static int reader_open(struct reader *reader, const char *path, struct error *error) {
  int code = 0;
  reader->path = path;
  reader->text = malloc(FILE_LIMIT_BYTES + 1);
  FILE *file = fopen(path, "rb");
  if (file == NULL) {
    code = error_set(error, ERROR_INPUT, "%s: %s", path, strerror(errno));
  } else if (reader->text == NULL) {
    code = error_set(error, ERROR_WORK, "%s: no memory to read it", path);
  } else {
    reader->bytes = fread(reader->text, 1, FILE_LIMIT_BYTES + 1, file);
    if (ferror(file))
      code = error_set(error, ERROR_INPUT, "%s: %s", path, strerror(errno));
    else if (reader->bytes > FILE_LIMIT_BYTES)
      code = error_set(error, ERROR_INPUT, "%s: more than %d bytes: not a recipe", path, FILE_LIMIT_BYTES);
  }
  if (file != NULL) fclose(file);
  if (code == 0 && !yaml_parser_initialize(&reader->parser)) code = error_set(error, ERROR_WORK, "%s: no memory to read it", path);
  if (code != 0) {
    free(reader->text);
    return code;
  }
  yaml_parser_set_input_string(&reader->parser, (const unsigned char *)reader->text, reader->bytes);
  return 0;
}

static void reader_close(struct reader *reader) {
  yaml_parser_delete(&reader->parser);
  free(reader->text);
}

/* Says what is wrong with the YAML itself and in which line. */
static int syntax_error(const struct reader *reader, struct error *error) {
  const yaml_parser_t *parser = &reader->parser;
  size_t line = parser->problem_mark.line + 1;
  if (parser->error == YAML_READER_ERROR) { /* has no mark, only an offset in bytes */
    line = 1;
    for (size_t i = 0; i < parser->problem_offset && i < reader->bytes; i++) line += reader->text[i] == '\n';
  }
  return error_set(error, ERROR_INPUT, "%s:%zu: not YAML: %s", reader->path, line,
                   parser->problem != NULL ? parser->problem : "cannot be read");
}

/* Takes the next event, which is deleted by the caller. */
static int reader_next(struct reader *reader, yaml_event_t *event, struct error *error) {
  if (yaml_parser_parse(&reader->parser, event)) return 0;
  memset(event, 0, sizeof *event);
  return syntax_error(reader, error);
}

/* Takes one event, which has to be of type `wanted`; `otherwise` says what is wrong if it is not. */
static int reader_expect(struct reader *reader, yaml_event_type_t wanted, const char *otherwise, struct error *error) {
  yaml_event_t event;
  if (reader_next(reader, &event, error)) return error->code;
  if (event.type != wanted) error_set(error, ERROR_INPUT, "%s:%zu: %s", reader->path, event.start_mark.line + 1, otherwise);
  yaml_event_delete(&event);
  return error->code;
}

/* Text of a scalar event, or NULL with an error for a list, a mapping, an alias or text with zero bytes. */
static const char *scalar_text(const struct reader *reader, const yaml_event_t *event, const char *what, struct error *error) {
  const char *text = event->type == YAML_SCALAR_EVENT ? (const char *)event->data.scalar.value : NULL;
  if (text != NULL && strlen(text) == event->data.scalar.length) return text;
  error_set(error, ERROR_INPUT, "%s:%zu: %s: not a plain value", reader->path, event->start_mark.line + 1, what);
  return NULL;
}

/* The setting that a key names; `seen` marks those read before. */
static const struct setting *find_key(const struct reader *reader, const yaml_event_t *event, bool seen[SETTINGS], struct error *error) {
  const char *key = scalar_text(reader, event, "a key", error);
  if (key == NULL) return NULL;
  size_t line = event->start_mark.line + 1;
  const struct setting *setting = setting_find(settings, SETTINGS, key);
  if (setting == NULL) {
    const struct setting *nearest = setting_nearest(settings, SETTINGS, key);
    error_set(error, ERROR_INPUT, "%s:%zu: %s: unknown key; %s%s%s", reader->path, line, printable(key).text,
              nearest ? "did you mean " : "'omniquant calibrate --help' lists them", nearest ? nearest->name : "", nearest ? "?" : "");
    return NULL;
  }
  if (seen[setting - settings]) {
    error_set(error, ERROR_INPUT, "%s:%zu: %s: given twice: remove one", reader->path, line, key);
    return NULL;
  }
  seen[setting - settings] = true;
  return setting;
}

static int read_value(struct recipe *recipe, struct reader *reader, const struct setting *setting, struct error *error) {
  yaml_event_t event;
  char origin[600];
  if (reader_next(reader, &event, error)) return error->code;
  const char *text = scalar_text(reader, &event, setting->name, error);
  snprintf(origin, sizeof origin, "%s:%zu: %s", reader->path, event.start_mark.line + 1, setting->name);
  if (text != NULL) recipe_set(recipe, setting, text, origin, error);
  yaml_event_delete(&event);
  return error->code;
}

/* Reads pairs of key and value until the mapping ends. */
static int read_pairs(struct recipe *recipe, struct reader *reader, struct error *error) {
  bool seen[SETTINGS] = {false}, end = false;
  while (!end && error->code == 0) {
    yaml_event_t event;
    if (reader_next(reader, &event, error)) return error->code;
    end = event.type == YAML_MAPPING_END_EVENT;
    const struct setting *setting = end ? NULL : find_key(reader, &event, seen, error);
    yaml_event_delete(&event);
    if (setting != NULL) read_value(recipe, reader, setting, error);
  }
  return error->code;
}

int recipe_load(struct recipe *recipe, const char *path, struct error *error) {
  struct reader reader = {0};
  if (reader_open(&reader, path, error)) return error->code;
  const char *mend = "not a mapping: write lines like 'wbits: 4'";
  int code = reader_expect(&reader, YAML_STREAM_START_EVENT, mend, error);
  if (code == 0) code = reader_expect(&reader, YAML_DOCUMENT_START_EVENT, "no settings: write lines like 'wbits: 4'", error);
  if (code == 0) code = reader_expect(&reader, YAML_MAPPING_START_EVENT, mend, error);
  if (code == 0) code = read_pairs(recipe, &reader, error);
  if (code == 0) code = reader_expect(&reader, YAML_DOCUMENT_END_EVENT, mend, error);
  if (code == 0) code = reader_expect(&reader, YAML_STREAM_END_EVENT, "a second document: a recipe is one", error);
  reader_close(&reader);
  return code;
}

static json_t *setting_json(const struct recipe *recipe, const struct setting *setting) {
  const void *field = (const char *)recipe + setting->offset;
  const char *choice;
  int length;
  switch (setting->type) {
  case SETTING_INT:
    return json_integer(*(const int *)field);
  case SETTING_INT64:
    return json_integer(*(const int64_t *)field);
  case SETTING_BOOL:
    return json_boolean(*(const bool *)field);
  case SETTING_REAL:
    return json_real(*(const double *)field);
  case SETTING_TEXT:
    return json_string(*(const char *const *)field);
  case SETTING_TEXTS: /* no setting of a recipe */
    return NULL;
  case SETTING_ENUM:
    choice = setting_choice(setting, *(const int *)field, &length);
    return choice != NULL ? json_stringn(choice, (size_t)length) : NULL;
  }
  return NULL;
}

/* The fewest digits with which every real of the recipe reads back as itself: 0.05 rather than 0.050000000000000003. */
static size_t real_digits(const struct recipe *recipe) {
  size_t digits = 15;
  for (size_t i = 0; i < SETTINGS; i++) {
    if (settings[i].type != SETTING_REAL) continue;
    double value = *(const double *)((const char *)recipe + settings[i].offset);
    char text[40];
    for (; digits < 17; digits++) {
      snprintf(text, sizeof text, "%.*g", (int)digits, value);
      if (strtod(text, NULL) == value) break;
    }
  }
  return digits;
}

char *recipe_json(const struct recipe *recipe) {
  char *text = NULL;
  json_t *object = json_object();
  bool failed = object == NULL;
  for (size_t i = 0; i < SETTINGS && !failed; i++)
    failed = json_object_set_new(object, settings[i].name, setting_json(recipe, &settings[i])) != 0;
  if (!failed) text = json_dumps(object, JSON_REAL_PRECISION(real_digits(recipe)));
  json_decref(object);
  return text;
}

/* Whether a JSON value is of the kind that setting_json makes. */
static bool is_kind(const struct setting *setting, const json_t *value) {
  switch (setting->type) {
  case SETTING_INT:
  case SETTING_INT64:
    return json_is_integer(value);
  case SETTING_BOOL:
    return json_is_boolean(value);
  case SETTING_REAL:
    return json_is_number(value);
  default:
    return json_is_string(value);
  }
}

/* The value as setting_set takes it, freed by the caller; NULL without memory. */
static char *value_text(const json_t *value) {
  return json_is_string(value) ? strdup(json_string_value(value)) : json_dumps(value, JSON_ENCODE_ANY);
}

static int set_from_json(struct recipe *recipe, const char *key, const json_t *value, const char *where, struct error *error) {
  const struct setting *setting = setting_find(settings, SETTINGS, key);
  char origin[400];
  if (setting == NULL)
    return error_set(error, ERROR_INPUT, "%s: recipe: %s: unknown key; a newer version of this program made it, or it is damaged", where,
                     printable(key).text);
  char *text = value_text(value);
  if (text == NULL) return error_set(error, ERROR_WORK, "%s: no memory to read the recipe", where);
  snprintf(origin, sizeof origin, "%s: recipe: %s", where, key);
  if (is_kind(setting, value))
    recipe_set(recipe, setting, text, origin, error);
  else
    error_set(error, ERROR_INPUT, "%s: '%s' is of the wrong type; it is damaged", origin, printable(text).text);
  free(text);
  return error->code;
}

int recipe_from_json(struct recipe *recipe, const char *text, const char *where, struct error *error) {
  struct error reason = {0};
  const char *key;
  json_t *object = json_loads(text, JSON_REJECT_DUPLICATES, NULL), *value;
  recipe_init(recipe);
  if (!json_is_object(object)) {
    error_set(error, ERROR_INPUT, "%s: recipe: not a JSON object; it is damaged", where);
  } else {
    json_object_foreach(object, key, value) if (set_from_json(recipe, key, value, where, error)) break;
    if (error->code == 0 && recipe_check(recipe, &reason)) error_set(error, reason.code, "%s: recipe: %s", where, reason.message);
  }
  json_decref(object);
  return error->code;
}
