/* test_recipe.c: recipes: defaults, reading YAML with each kind of error and its line, ranges, checks between settings, JSON, the flags
 * made of the same table, and the recipe files that are installed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <glob.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "arguments.h"
#include "recipe.h"

#define CONFIGS FIXTURES "/../../configs/"

static char file_path[] = "/tmp/omniquant-recipe-XXXXXX";

static int make_file(void **state) {
  (void)state;
  int descriptor = mkstemp(file_path);
  return descriptor < 0 ? -1 : close(descriptor);
}

static int remove_file(void **state) {
  (void)state;
  return unlink(file_path);
}

static int load_bytes(struct recipe *recipe, const char *text, size_t bytes, struct error *error) {
  FILE *file = fopen(file_path, "wb");
  assert_non_null(file);
  assert_int_equal(fwrite(text, 1, bytes, file), bytes);
  assert_int_equal(fclose(file), 0);
  recipe_init(recipe);
  *error = (struct error){0};
  return recipe_load(recipe, file_path, error);
}

static int load(struct recipe *recipe, const char *text, struct error *error) {
  return load_bytes(recipe, text, strlen(text), error);
}

/* The text must be refused with "FILE" + expected, where expected begins with ":LINE: ". */
static void refuse_bytes(const char *text, size_t bytes, const char *expected) {
  struct recipe recipe;
  struct error error;
  char message[1200];
  assert_int_equal(load_bytes(&recipe, text, bytes, &error), ERROR_INPUT);
  snprintf(message, sizeof message, "%s%s", file_path, expected);
  assert_string_equal(error.message, message);
  assert_null(strchr(error.message, '\n'));
}

static void refuse(const char *text, const char *expected) {
  refuse_bytes(text, strlen(text), expected);
}

static int set(struct recipe *recipe, const char *name, const char *text) {
  size_t count;
  struct error error = {0};
  const struct setting *settings = recipe_settings(&count), *setting = setting_find(settings, count, name);
  assert_non_null(setting);
  return recipe_set(recipe, setting, text, name, &error);
}

static void test_defaults(void **state) {
  (void)state;
  struct recipe recipe;
  struct error error = {0};
  memset(&recipe, 0xff, sizeof recipe);
  recipe_init(&recipe);
  assert_int_equal(recipe.wbits, 4);
  assert_int_equal(recipe.group_size, 0);
  assert_false(recipe.symmetric);
  assert_true(recipe.lwc);
  assert_false(recipe.aug_loss);
  assert_int_equal(recipe.lwc_init, LWC_INIT_PAPER);
  assert_int_equal(recipe.optimizer, OPTIMIZER_ADAMW);
  assert_int_equal(recipe.epochs, 20);
  assert_int_equal(recipe.batch, 1);
  assert_true(recipe.lwc_lr == 1e-2);
  assert_true(recipe.scale_lr);
  assert_int_equal(recipe.samples, 128);
  assert_int_equal(recipe.seqlen, 2048);
  assert_int_equal(recipe.sampling, SAMPLING_RANDOM);
  assert_int_equal(recipe.seed, 0);
  assert_int_equal(recipe_check(&recipe, &error), 0);
}

/* Every row has a default that its own range allows, a help line, and a name of its own. */
static void test_table(void **state) {
  (void)state;
  size_t count;
  const struct setting *settings = recipe_settings(&count);
  for (size_t i = 0; i < count; i++) {
    struct recipe recipe;
    recipe_init(&recipe);
    assert_non_null(settings[i].fallback);
    assert_int_equal(set(&recipe, settings[i].name, settings[i].fallback), 0);
    assert_true(strlen(settings[i].help) > 0 && strlen(settings[i].help) < 100);
    assert_ptr_equal(setting_find(settings, count, settings[i].name), &settings[i]);
    assert_true(settings[i].offset < sizeof recipe);
  }
}

static void test_load(void **state) {
  (void)state;
  struct recipe recipe;
  struct error error;
  const char *text =
      "# a comment\nwbits: 3\ngroup_size: 64   # another\nlwc: false\naug_loss: true\nlwc_init: search\noptimizer: \"sign\"\n"
      "epochs: 5\nbatch: 8\nlwc_lr: 5e-2\nscale_lr: false\nsamples: 16\nseqlen: 512\nsampling: sequential\n"
      "seed: 9007199254740991\nsymmetric: true\n";
  assert_int_equal(load(&recipe, text, &error), 0);
  assert_int_equal(recipe.wbits, 3);
  assert_int_equal(recipe.group_size, 64);
  assert_true(recipe.symmetric);
  assert_false(recipe.lwc);
  assert_true(recipe.aug_loss);
  assert_int_equal(recipe.lwc_init, LWC_INIT_SEARCH);
  assert_int_equal(recipe.optimizer, OPTIMIZER_SIGN);
  assert_int_equal(recipe.epochs, 5);
  assert_int_equal(recipe.batch, 8);
  assert_true(recipe.lwc_lr == 5e-2);
  assert_false(recipe.scale_lr);
  assert_int_equal(recipe.samples, 16);
  assert_int_equal(recipe.seqlen, 512);
  assert_int_equal(recipe.sampling, SAMPLING_SEQUENTIAL);
  assert_true(recipe.seed == INT64_C(9007199254740991));
}

/* What a file does not name stays as it was; other spellings of one mapping are the same to YAML. */
static void test_load_partly(void **state) {
  (void)state;
  struct recipe recipe;
  struct error error;
  assert_int_equal(load(&recipe, "---\nwbits: 2\n...\n", &error), 0);
  assert_int_equal(recipe.wbits, 2);
  assert_int_equal(recipe.samples, 128);
  assert_int_equal(load(&recipe, "{wbits: 5, seed: 7}", &error), 0);
  assert_int_equal(recipe.wbits, 5);
  assert_int_equal(load(&recipe, "\xef\xbb\xbfwbits: 6\r\nseed: 1\r\n", &error), 0); /* byte order mark, DOS lines */
  assert_int_equal(recipe.wbits, 6);
  assert_int_equal(load(&recipe, "{}\n", &error), 0);
}

static void test_refused_values(void **state) {
  (void)state;
  refuse("seed: 1\n\nwbits: 9\n", ":3: wbits: 9 is not in 2..8");
  refuse("wbits: 1\n", ":1: wbits: 1 is not in 2..8");
  refuse("wbits: 4x\n", ":1: wbits: '4x' is not a whole number");
  refuse("wbits: 4.0\n", ":1: wbits: '4.0' is not a whole number");
  refuse("wbits: 0x4\n", ":1: wbits: '0x4' is not a whole number");
  refuse("wbits: \" 4\"\n", ":1: wbits: ' 4' is not a whole number");
  refuse("wbits:\nseed: 1\n", ":1: wbits: '' is not a whole number");
  refuse("epochs: -1\n", ":1: epochs: -1 is not in 0..1000000");
  refuse("epochs: 99999999999999999999\n", ":1: epochs: 99999999999999999999 is not in 0..1000000");
  refuse("seed: 9007199254740992\n", ":1: seed: 9007199254740992 is not in 0..9007199254740991");
  refuse("lwc_lr: 1e400\n", ":1: lwc_lr: 1e400 is not in 0..100");
  refuse("lwc_lr: -1\n", ":1: lwc_lr: -1 is not in 0..100");
  refuse("lwc_lr: .nan\n", ":1: lwc_lr: '.nan' is not a number");
  refuse("lwc_lr: nan\n", ":1: lwc_lr: 'nan' is not a number");
  refuse("lwc_lr: inf\n", ":1: lwc_lr: 'inf' is not a number");
  refuse("lwc_lr: 1e\n", ":1: lwc_lr: '1e' is not a number");
  refuse("lwc: yes\n", ":1: lwc: 'yes' is not true or false");
  refuse("sampling: rand\n", ":1: sampling: 'rand' is not one of random|sequential");
  refuse("sampling: randomly\n", ":1: sampling: 'randomly' is not one of random|sequential");
  refuse("sampling: random|sequential\n", ":1: sampling: 'random|sequential' is not one of random|sequential");
  refuse("sampling: ''\n", ":1: sampling: '' is not one of random|sequential");
}

static void test_refused_shape(void **state) {
  (void)state;
  refuse("wbits: 4\ngroupsize: 64\n", ":2: groupsize: unknown key; did you mean group_size?");
  refuse("group-size: 64\n", ":1: group-size: unknown key; did you mean group_size?");
  refuse("learning: 64\n", ":1: learning: unknown key; 'omniquant calibrate --help' lists them");
  refuse("\"wb\\nits\": 4\n", ":1: wb?its: unknown key; did you mean wbits?");
  refuse("wbits: 4\nseed: 1\nwbits: 4\n", ":3: wbits: given twice: remove one");
  refuse("wbits: [4]\n", ":1: wbits: not a plain value");
  refuse("wbits:\n  bits: 4\n", ":2: wbits: not a plain value");
  refuse("seed: &a 1\nwbits: *a\n", ":2: wbits: not a plain value");
  refuse("? [a]\n: 4\n", ":1: a key: not a plain value");
  refuse("sampling: \"random\\0\"\n", ":1: sampling: not a plain value");
  refuse("- wbits: 4\n", ":1: not a mapping: write lines like 'wbits: 4'");
  refuse("wbits\n", ":1: not a mapping: write lines like 'wbits: 4'");
  refuse("wbits: 4\n---\nwbits: 4\n", ":2: a second document: a recipe is one");
  refuse("", ":1: no settings: write lines like 'wbits: 4'");
  refuse("# nothing\n", ":2: no settings: write lines like 'wbits: 4'");
}

/* libyaml's own words may change with its version: only the line and the kind are ours. */
static void refuse_yaml(const char *text, size_t bytes, int line) {
  struct recipe recipe;
  struct error error;
  char start[1200];
  assert_int_equal(load_bytes(&recipe, text, bytes, &error), ERROR_INPUT);
  int length = snprintf(start, sizeof start, "%s:%d: not YAML: ", file_path, line);
  assert_true(strlen(error.message) > (size_t)length);
  error.message[length] = '\0';
  assert_string_equal(error.message, start);
}

static void test_refused_text(void **state) {
  (void)state;
  refuse_yaml("wbits: 4\nseed: 1\nlwc: \xff\n", 24, 3); /* not UTF-8 */
  refuse_yaml("wbits: 4\nseed: \0001\n", 18, 2);
  refuse_yaml("wbits: 4\n\tseed: 1\n", 18, 2);
  refuse_yaml("wbits: \"4\n", 10, 2);
  refuse_yaml("{wbits: 4\n", 10, 2);
  char *big = malloc(70000);
  assert_non_null(big);
  memset(big, '\n', 70000);
  refuse_bytes(big, 70000, ": more than 65536 bytes: not a recipe");
  free(big);
}

static void test_refused_file(void **state) {
  (void)state;
  struct recipe recipe;
  struct error error = {0}, folder = {0};
  recipe_init(&recipe);
  assert_int_equal(recipe_load(&recipe, "no/such.yaml", &error), ERROR_INPUT);
  assert_string_equal(error.message, "no/such.yaml: No such file or directory");
  assert_int_equal(recipe_load(&recipe, "/tmp", &folder), ERROR_INPUT);
  assert_string_equal(folder.message, "/tmp: Is a directory");
}

/* A long value is cut in the message, never inside a UTF-8 character or across lines. */
static void test_long_value(void **state) {
  (void)state;
  struct recipe recipe;
  struct error error;
  char text[2000] = "wbits: \"";
  for (int i = 0; i < 400; i++) strcat(text, "\\n\xc3\xa9");
  strcat(text, "\"\n");
  assert_int_equal(load(&recipe, text, &error), ERROR_INPUT);
  assert_true(strlen(error.message) < 300);
  assert_null(strchr(error.message, '\n'));
}

/* Both ends of each range are allowed and the next values are not. */
static void test_bounds(void **state) {
  (void)state;
  size_t count;
  const struct setting *settings = recipe_settings(&count);
  for (size_t i = 0; i < count; i++) {
    struct recipe recipe;
    char text[40];
    bool real = settings[i].type == SETTING_REAL;
    if (!real && settings[i].type != SETTING_INT && settings[i].type != SETTING_INT64) continue;
    double step = real ? 1e-3 : 1, values[] = {settings[i].min, settings[i].max, settings[i].min - step, settings[i].max + step};
    recipe_init(&recipe);
    for (int k = 0; k < 4; k++) {
      snprintf(text, sizeof text, real ? "%.3f" : "%.0f", values[k]);
      assert_int_equal(set(&recipe, settings[i].name, text), k < 2 ? 0 : ERROR_INPUT);
    }
  }
}

static void test_check(void **state) {
  (void)state;
  struct recipe recipe;
  struct error batch = {0}, rate = {0}, none = {0};
  recipe_init(&recipe);
  recipe.batch = 129;
  assert_int_equal(recipe_check(&recipe, &batch), ERROR_INPUT);
  assert_string_equal(batch.message, "batch: 129 is more than the 128 samples: lower batch or raise samples");
  recipe.batch = 128;
  recipe.lwc_lr = 0;
  assert_int_equal(recipe_check(&recipe, &rate), ERROR_INPUT);
  recipe.epochs = 0;
  assert_int_equal(recipe_check(&recipe, &none), 0);
  recipe.epochs = 1;
  recipe.lwc = false;
  assert_int_equal(recipe_check(&recipe, &none), 0);
}

/* The stored JSON, read back key by key as text, makes the same recipe, bit for bit. */
static void test_json(void **state) {
  (void)state;
  struct recipe recipe, again;
  struct error error;
  const char *reals[] = {"0.05", "1e-2", "0.1", "3.0000000000000004e-2", "100", "0.333333333333333315"};
  for (size_t r = 0; r < sizeof reals / sizeof *reals; r++) {
    assert_int_equal(
        load(&recipe, "{symmetric: true, lwc: false, lwc_init: search, optimizer: sign, sampling: sequential, seed: 123456789012}", &error),
        0);
    assert_int_equal(set(&recipe, "lwc_lr", reals[r]), 0);
    char *text = recipe_json(&recipe);
    assert_non_null(text);
    const char *start = "{\"wbits\": 4, \"group_size\": 0, \"symmetric\": true, ";
    assert_int_equal(strncmp(text, start, strlen(start)), 0);
    if (r == 0) assert_non_null(strstr(text, "\"lwc_lr\": 0.05,"));
    json_t *object = json_loads(text, 0, NULL), *value;
    const char *key;
    size_t count, seen = 0;
    recipe_settings(&count);
    recipe_init(&again);
    json_object_foreach(object, key, value) {
      char *written = json_is_string(value) ? strdup(json_string_value(value)) : json_dumps(value, JSON_ENCODE_ANY);
      assert_int_equal(set(&again, key, written), 0);
      free(written);
      seen++;
    }
    assert_int_equal(seen, count);
    assert_memory_equal(&recipe, &again, sizeof recipe);
    json_decref(object);
    free(text);
  }
}

/* ---- flags ---- */

static const struct command commands[] = {
    {"calibrate", "", true, arguments_calibrate, NULL}, {"eval", "", true, arguments_eval, NULL}, {0}};

/* Reads the command line "omniquant calibrate --model m --tokens t --output o WORDS"; words are NULL-terminated. The arguments point into
 * a line that the next call overwrites. */
static int parse(struct arguments *arguments, struct error *error, const char *const *words) {
  static char line[64][96];
  const char *start[] = {"omniquant", "calibrate", "--model", "m", "--tokens", "t", "--output", "o"};
  char *argv[65] = {NULL};
  int argc = 0;
  for (; argc < 8; argc++) snprintf(line[argc], sizeof line[argc], "%s", start[argc]);
  for (; *words != NULL; words++, argc++) snprintf(line[argc], sizeof line[argc], "%s", *words);
  for (int i = 0; i < argc; i++) argv[i] = line[i];
  const struct command *command;
  *arguments = (struct arguments){0};
  *error = (struct error){0};
  return arguments_parse(arguments, commands, argc, argv, &command, error);
}

/* Every setting of the table has its flag, which sets what the YAML key of that name would. */
static void test_every_flag(void **state) {
  (void)state;
  size_t count;
  const struct setting *settings = recipe_settings(&count);
  for (size_t i = 0; i < count; i++) {
    const struct setting *s = &settings[i];
    bool flag = s->type == SETTING_BOOL, on = flag && strcmp(s->fallback, "true") == 0;
    const char *value = s->type == SETTING_ENUM ? strchr(s->choices, '|') + 1 : flag ? (on ? "false" : "true") : "7";
    char name[64], yaml[128];
    snprintf(name, sizeof name, "--%s%s", on ? "no-" : "", s->name);
    for (char *c = name; *c != '\0'; c++)
      if (*c == '_') *c = '-';
    snprintf(yaml, sizeof yaml, "%s: %s\nsamples: 200\n", s->name, value);
    if (strcmp(s->name, "samples") == 0) *strchr(yaml, '\n') = '\0';
    struct arguments arguments;
    struct recipe by_flag, by_file;
    struct error error;
    const char *words[] = {name, flag ? "--samples" : value, flag ? "200" : "--samples", flag ? NULL : "200", NULL};
    if (strcmp(s->name, "samples") == 0) words[2] = NULL;
    assert_int_equal(parse(&arguments, &error, words), 0);
    assert_int_equal(arguments_recipe(&arguments, &by_flag, &error), 0);
    assert_int_equal(load(&by_file, yaml, &error), 0);
    assert_memory_equal(&by_flag, &by_file, sizeof by_flag);
    arguments_free(&arguments);
  }
}

/* A flag wins over the file before and after --config, the last of two wins, the file wins over the default. */
static void test_override(void **state) {
  (void)state;
  struct arguments arguments;
  struct recipe recipe;
  struct error error;
  assert_int_equal(load(&recipe, "wbits: 2\nlwc: true\nsamples: 16\nbatch: 4\n", &error), 0);
  const char *words[] = {"--wbits", "5", "--no-lwc", "--config", file_path, "--batch", "2", "--batch=8", NULL};
  assert_int_equal(parse(&arguments, &error, words), 0);
  assert_int_equal(arguments_recipe(&arguments, &recipe, &error), 0);
  assert_int_equal(recipe.wbits, 5);
  assert_false(recipe.lwc);
  assert_int_equal(recipe.batch, 8);
  assert_int_equal(recipe.samples, 16);
  arguments_free(&arguments);
  const char *too_many[] = {"--config", file_path, "--batch", "17", NULL};
  assert_int_equal(parse(&arguments, &error, too_many), 0);
  assert_int_equal(arguments_recipe(&arguments, &recipe, &error), ERROR_INPUT);
  arguments_free(&arguments);
}

static void test_blocks(void **state) {
  (void)state;
  static const struct {
    const char *text;
    int code, first, end;
  } cases[] = {{"0:2", 0, 0, 2},         {"3:", 0, 3, 0},
               {":4", 0, 0, 4},          {":", 0, 0, 0},
               {"3:3", 2, 0, 0},         {"4:3", 2, 0, 0},
               {"3", 2, 0, 0},           {"", 2, 0, 0},
               {"-1:2", 2, 0, 0},        {"1:2x", 2, 0, 0},
               {"a:b", 2, 0, 0},         {"1:0", 2, 0, 0},
               {"0:0", 2, 0, 0},         {"1:99999999999", 2, 0, 0},
               {"99999999999:", 2, 0, 0}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct arguments arguments;
    struct error error;
    const char *words[] = {"--blocks", cases[i].text, NULL};
    assert_int_equal(parse(&arguments, &error, words), cases[i].code);
    if (cases[i].code == 0) {
      assert_int_equal(arguments.calibrate.first_block, cases[i].first);
      assert_int_equal(arguments.calibrate.end_block, cases[i].end);
    }
    arguments_free(&arguments);
  }
}

/* ---- installed recipes ---- */

/* Each recipe file is read and checked, and one named after its bits and group holds these. */
static void test_configs(void **state) {
  (void)state;
  glob_t found;
  assert_int_equal(glob(CONFIGS "*.yaml", 0, NULL, &found), 0);
  assert_true(found.gl_pathc >= 9);
  for (size_t i = 0; i < found.gl_pathc; i++) {
    struct recipe recipe;
    struct error error = {0};
    int bits, group = 0;
    recipe_init(&recipe);
    if (recipe_load(&recipe, found.gl_pathv[i], &error) || recipe_check(&recipe, &error)) fail_msg("%s", error.message);
    if (sscanf(strrchr(found.gl_pathv[i], '/'), "/paper-w%da16g%d.yaml", &bits, &group) < 1) continue;
    assert_int_equal(recipe.wbits, bits);
    assert_int_equal(recipe.group_size, group);
    assert_int_equal(recipe.epochs, bits == 2 ? 40 : 20);
    assert_int_equal(recipe.aug_loss, bits == 2);
  }
  globfree(&found);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_defaults),     cmocka_unit_test(test_table),          cmocka_unit_test(test_load),
      cmocka_unit_test(test_load_partly),  cmocka_unit_test(test_refused_values), cmocka_unit_test(test_refused_shape),
      cmocka_unit_test(test_refused_text), cmocka_unit_test(test_refused_file),   cmocka_unit_test(test_long_value),
      cmocka_unit_test(test_bounds),       cmocka_unit_test(test_check),          cmocka_unit_test(test_json),
      cmocka_unit_test(test_every_flag),   cmocka_unit_test(test_override),       cmocka_unit_test(test_blocks),
      cmocka_unit_test(test_configs),
  };
  return cmocka_run_group_tests(tests, make_file, remove_file);
}
