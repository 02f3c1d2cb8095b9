/* test_recipe.c: recipes: defaults, reading YAML with each kind of error and its line, ranges, checks between settings, JSON both ways, the
 * flags made of the same table, several recipes of one pass, and the recipe files that are installed. */
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
#include <sys/stat.h>
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
  assert_int_equal(recipe.activations.abits, 16);
  assert_int_equal(recipe.activations.kv_bits, 0);
  assert_int_equal(recipe.activations.granularity, GRANULARITY_TOKEN);
  assert_int_equal(recipe.activations.group_size, 128);
  assert_int_equal(recipe.activations.kv_granularity, KV_HEAD);
  assert_false(recipe.let || recipe.let_up);
  assert_true(recipe.alpha == 0.5 && recipe.let_lr == 5e-3);
  assert_int_equal(recipe_check(&recipe, &error), 0);
}

static void test_kv_bits(void **state) {
  (void)state;
  assert_int_equal(recipe_kv_bits(&(struct activation_quantizer){.abits = 6}), 6);
  assert_int_equal(recipe_kv_bits(&(struct activation_quantizer){.abits = 16}), 16);
  assert_int_equal(recipe_kv_bits(&(struct activation_quantizer){.abits = 6, .kv_bits = 16}), 16);
  assert_int_equal(recipe_kv_bits(&(struct activation_quantizer){.abits = 16, .kv_bits = 4}), 4);
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
      "seed: 9007199254740991\nsymmetric: true\nabits: 4\nkv_bits: 8\nact_granularity: group\nact_group_size: 32\n"
      "kv_granularity: token\nlet: true\nlet_up: true\nalpha: 0.75\nlet_lr: 1e-3\n";
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
  assert_int_equal(recipe.activations.abits, 4);
  assert_int_equal(recipe.activations.kv_bits, 8);
  assert_int_equal(recipe.activations.granularity, GRANULARITY_GROUP);
  assert_int_equal(recipe.activations.group_size, 32);
  assert_int_equal(recipe.activations.kv_granularity, KV_TOKEN);
  assert_true(recipe.let && recipe.let_up);
  assert_true(recipe.alpha == 0.75 && recipe.let_lr == 1e-3);
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
  refuse("abits: 1\n", ":1: abits: 1 is not in 2..16");
  refuse("abits: 17\n", ":1: abits: 17 is not in 2..16");
  refuse("kv_bits: 17\n", ":1: kv_bits: 17 is not in 0..16");
  refuse("act_granularity: row\n", ":1: act_granularity: 'row' is not one of token|tensor|group");
  refuse("act_group_size: 0\n", ":1: act_group_size: 0 is not in 1..16777216");
  refuse("kv_granularity: tensor\n", ":1: kv_granularity: 'tensor' is not one of head|token");
  refuse("alpha: 1.5\n", ":1: alpha: 1.5 is not in 0..1");
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
  static const struct {
    const char *recipe, *expected; /* NULL: good */
  } cases[] = {
      {"batch: 129", "batch: 129 is more than the 128 samples: lower batch or raise samples"},
      {"{batch: 128}", NULL},
      {"lwc_lr: 0", "lwc_lr: 0 would learn nothing in 20 epochs: raise it, or set epochs to 0"},
      {"{lwc_lr: 0, epochs: 0}", NULL},
      {"{lwc_lr: 0, lwc: false}", NULL},
      {"{lwc_lr: 0, optimizer: sign}", NULL},
      {"{sign_span: 0, optimizer: sign}", "sign_span: 0 would learn nothing in 20 epochs: raise it, or set epochs to 0"},
      {"sign_span: 0", NULL},
      {"let_lr: 0", NULL},
      {"{let: true, let_lr: 0}", "let_lr: 0 would learn nothing in 20 epochs: raise it, or set epochs to 0"},
      {"{let: true, let_lr: 0, epochs: 0}", NULL},
      {"{let: true, lwc: false, lwc_lr: 0}", NULL},
      {"{let: true, let_lr: 0, optimizer: sign}", "let_lr: 0 would learn nothing in 20 epochs: raise it, or set epochs to 0"},
      {"let_up: true", "let_up: true is a part of let, which is false: set let to true, or let_up to false"},
      {"{let: true, let_up: true}", NULL},
      {"kv_bits: 1", "kv_bits: 1 is neither 0 (as abits) nor in 2..16"},
      {"{kv_bits: 2, abits: 8}", NULL},
      {"{lwc: false, let: false, abits: 6}", NULL},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct recipe recipe;
    struct error error;
    assert_int_equal(load(&recipe, cases[i].recipe, &error), 0);
    assert_int_equal(recipe_check(&recipe, &error), cases[i].expected != NULL ? ERROR_INPUT : 0);
    if (cases[i].expected != NULL) assert_string_equal(error.message, cases[i].expected);
  }
}

/* The stored JSON, read back, makes the same recipe, bit for bit. */
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
    json_t *object = json_loads(text, 0, NULL);
    size_t count;
    recipe_settings(&count);
    assert_int_equal(json_object_size(object), count);
    memset(&again, 0xff, sizeof again);
    if (recipe_from_json(&again, text, "out", &error)) fail_msg("%s", error.message);
    assert_memory_equal(&recipe, &again, sizeof recipe);
    json_decref(object);
    free(text);
  }
}

/* What an older store does not say is the default; a whole number may stand for a real. */
static void test_from_json(void **state) {
  (void)state;
  struct recipe recipe, expected;
  struct error error = {0};
  assert_int_equal(recipe_from_json(&recipe, "{\"wbits\": 3, \"sampling\": \"sequential\", \"lwc_lr\": 1}", "out", &error), 0);
  recipe_init(&expected);
  expected.wbits = 3;
  expected.sampling = SAMPLING_SEQUENTIAL;
  expected.lwc_lr = 1;
  assert_memory_equal(&recipe, &expected, sizeof recipe);
  assert_int_equal(recipe_from_json(&recipe, "{}", "out", &error), 0);
  static const char *const cases[][2] = {
      {"", "out: recipe: not a JSON object; it is damaged"},
      {"[]", "out: recipe: not a JSON object; it is damaged"},
      {"{\"wbits\": 3, \"wbits\": 3}", "out: recipe: not a JSON object; it is damaged"},
      {"{\"colour\": 3}", "out: recipe: colour: unknown key; a newer version of this program made it, or it is damaged"},
      {"{\"a\\nb\": 3}", "out: recipe: a?b: unknown key; a newer version of this program made it, or it is damaged"},
      {"{\"wbits\": 9}", "out: recipe: wbits: 9 is not in 2..8"},
      {"{\"wbits\": \"4\"}", "out: recipe: wbits: '4' is of the wrong type; it is damaged"},
      {"{\"wbits\": 4.0}", "out: recipe: wbits: '4.0' is of the wrong type; it is damaged"},
      {"{\"wbits\": null}", "out: recipe: wbits: 'null' is of the wrong type; it is damaged"},
      {"{\"lwc\": \"true\"}", "out: recipe: lwc: 'true' is of the wrong type; it is damaged"},
      {"{\"lwc_lr\": \"1\"}", "out: recipe: lwc_lr: '1' is of the wrong type; it is damaged"},
      {"{\"lwc_lr\": [1]}", "out: recipe: lwc_lr: '[1]' is of the wrong type; it is damaged"},
      {"{\"act_granularity\": 1}", "out: recipe: act_granularity: '1' is of the wrong type; it is damaged"},
      {"{\"act_granularity\": \"row\"}", "out: recipe: act_granularity: 'row' is not one of token|tensor|group"},
      {"{\"kv_bits\": 1}", "out: recipe: kv_bits: 1 is neither 0 (as abits) nor in 2..16"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    error = (struct error){0};
    assert_int_equal(recipe_from_json(&recipe, cases[i][0], "out", &error), ERROR_INPUT);
    assert_string_equal(error.message, cases[i][1]);
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

/* The one recipe of a command line. */
static int one_recipe(const struct arguments *arguments, struct recipe *recipe, struct error *error) {
  struct calibrate_recipe recipes[CALIBRATE_MAX_RECIPES];
  int count = 0, code = arguments_recipes(arguments, recipes, &count, error);
  assert_int_equal(count, 1);
  if (code == 0) assert_string_equal(recipes[0].output, "o");
  *recipe = recipes[0].recipe;
  return code;
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
    char name[64], yaml[128], second[32];
    if (s->type == SETTING_ENUM) { /* the second choice of several */
      snprintf(second, sizeof second, "%.*s", (int)strcspn(value, "|"), value);
      value = second;
    }
    if (strcmp(s->name, "alpha") == 0) value = "0.25";
    /* What the setting needs beside it: a batch has to fit into the samples, and let_up is a part of let. */
    bool up = strcmp(s->name, "let_up") == 0, samples = strcmp(s->name, "samples") == 0;
    const char *other = up ? "--let" : samples ? NULL : "--samples";
    snprintf(name, sizeof name, "--%s%s", on ? "no-" : "", s->name);
    for (char *c = name; *c != '\0'; c++)
      if (*c == '_') *c = '-';
    snprintf(yaml, sizeof yaml, "%s: %s\n%s", s->name, value, up ? "let: true\n" : samples ? "" : "samples: 200\n");
    struct arguments arguments;
    struct recipe by_flag, by_file;
    struct error error;
    const char *with_value[] = {name, value, other, "200", NULL}, *without[] = {name, other, up ? NULL : "200", NULL};
    if (parse(&arguments, &error, flag ? without : with_value)) fail_msg("%s", error.message);
    if (one_recipe(&arguments, &by_flag, &error)) fail_msg("%s", error.message);
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
  assert_int_equal(one_recipe(&arguments, &recipe, &error), 0);
  assert_int_equal(recipe.wbits, 5);
  assert_false(recipe.lwc);
  assert_int_equal(recipe.batch, 8);
  assert_int_equal(recipe.samples, 16);
  arguments_free(&arguments);
  const char *too_many[] = {"--config", file_path, "--batch", "17", NULL};
  assert_int_equal(parse(&arguments, &error, too_many), 0);
  assert_int_equal(one_recipe(&arguments, &recipe, &error), ERROR_INPUT);
  arguments_free(&arguments);
}

/* ---- several recipes ---- */

static char config_folder[40];

/* A file in the folder, made of the text; the path lives for some calls. */
static const char *config_file(const char *name, const char *text) {
  static char path[16][96];
  static int next;
  char *at = path[next++ % 16];
  snprintf(at, sizeof path[0], "%s/%s", config_folder, name);
  FILE *file = fopen(at, "wb");
  assert_non_null(file);
  fputs(text, file);
  assert_int_equal(fclose(file), 0);
  return at;
}

static int make_folder(void **state) {
  (void)state;
  char other[64];
  strcpy(config_folder, "/tmp/omniquant-recipes-XXXXXX");
  if (mkdtemp(config_folder) == NULL) return -1;
  snprintf(other, sizeof other, "%s/other", config_folder);
  return mkdir(other, 0777);
}

static int remove_folder(void **state) {
  (void)state;
  char command[100];
  snprintf(command, sizeof command, "rm -r %s", config_folder);
  return system(command);
}

static void test_several(void **state) {
  (void)state;
  struct arguments arguments;
  struct calibrate_recipe recipes[CALIBRATE_MAX_RECIPES];
  struct error error;
  int count;
  const char *a = config_file("w3.yaml", "{wbits: 3, lwc: false}"), *b = config_file("w2.g64.yml", "{wbits: 2, group_size: 64}");
  const char *c = config_file("plain", "{wbits: 8, group_size: 32}");
  const char *words[] = {"--config", a, "--group-size", "16", "--config", b, "--config", c, "--output", "out", NULL};
  if (parse(&arguments, &error, words)) fail_msg("%s", error.message);
  memset(recipes, 0xff, sizeof recipes);
  if (arguments_recipes(&arguments, recipes, &count, &error)) fail_msg("%s", error.message);
  assert_int_equal(count, 3);
  assert_string_equal(recipes[0].output, "out/w3");
  assert_string_equal(recipes[1].output, "out/w2.g64");
  assert_string_equal(recipes[2].output, "out/plain");
  assert_int_equal(recipes[0].recipe.wbits, 3);
  assert_int_equal(recipes[1].recipe.wbits, 2);
  assert_int_equal(recipes[2].recipe.wbits, 8);
  assert_false(recipes[0].recipe.lwc);
  assert_true(recipes[1].recipe.lwc);
  for (int i = 0; i < 3; i++) assert_int_equal(recipes[i].recipe.group_size, 16); /* the flag overrides all */
  struct calibrate_recipe zero = {0};                                             /* they are sent as bytes */
  assert_memory_equal(recipes[2].output + strlen("out/plain"), zero.output, sizeof zero.output - strlen("out/plain"));
  arguments_free(&arguments);
}

/* "%s" in the expected message stands for the folder of the recipes. */
static void refuse_several(const char *const *words, const char *expected) {
  struct arguments arguments;
  struct calibrate_recipe recipes[CALIBRATE_MAX_RECIPES];
  struct error error;
  char message[1200];
  int count;
  if (parse(&arguments, &error, words) == 0) assert_int_equal(arguments_recipes(&arguments, recipes, &count, &error), ERROR_INPUT);
  snprintf(message, sizeof message, expected, config_folder, config_folder);
  assert_string_equal(error.message, message);
  arguments_free(&arguments);
}

static void test_refused_several(void **state) {
  (void)state;
  const char *a = config_file("a.yaml", "wbits: 3"), *twin = config_file("other/a.yaml", "wbits: 4");
  const char *bare = config_file(".yaml", "wbits: 3"), *dots = config_file("..yml", "wbits: 3");
  refuse_several((const char *[]){"--config", a, "--config", twin, NULL},
                 "%s/a.yaml and %s/other/a.yaml: both would be stored as o/a: rename one");
  refuse_several((const char *[]){"--config", a, "--config", a, NULL}, "%s/a.yaml and %s/a.yaml: both would be stored as o/a: rename one");
  refuse_several((const char *[]){"--config", a, "--config", bare, NULL}, "%s/.yaml: no folder can be named after it: rename it");
  refuse_several((const char *[]){"--config", a, "--config", dots, NULL}, "%s/..yml: no folder can be named after it: rename it");
  refuse_several((const char *[]){"--config", a, "--config", "", NULL}, "--config: is empty");
  static const char *const shared[][2] = {{"samples", "16"}, {"seqlen", "64"}, {"sampling", "sequential"}, {"seed", "7"}, {"batch", "2"}};
  for (int i = 0; i < 5; i++) {
    char text[64], expected[200];
    snprintf(text, sizeof text, "%s: %s", shared[i][0], shared[i][1]);
    const char *b = config_file("b.yaml", text);
    snprintf(expected, sizeof expected,
             "%%s/a.yaml and %%s/b.yaml: %s differs, which all recipes of one pass share: give it as --%s, or run them apart", shared[i][0],
             shared[i][0]);
    refuse_several((const char *[]){"--config", a, "--config", b, NULL}, expected);
    char flag[32];
    snprintf(flag, sizeof flag, "--%s", shared[i][0]);
    struct arguments arguments;
    struct calibrate_recipe recipes[CALIBRATE_MAX_RECIPES];
    struct error error;
    int count;
    assert_int_equal(parse(&arguments, &error, (const char *[]){"--config", a, "--config", b, flag, shared[i][1], NULL}), 0);
    if (arguments_recipes(&arguments, recipes, &count, &error)) fail_msg("%s", error.message);
    arguments_free(&arguments);
  }
  const char *b = config_file("b.yaml", "batch: 4"); /* what is wrong with one of them names it */
  refuse_several((const char *[]){"--config", b, "--config", a, "--samples", "3", NULL},
                 "%s/b.yaml: batch: 4 is more than the 3 samples: lower batch or raise samples");
}

/* More than are taken, and a path that does not fit. */
static void test_limits_of_several(void **state) {
  (void)state;
  const char *words[2 * CALIBRATE_MAX_RECIPES + 3] = {NULL};
  char name[CALIBRATE_MAX_RECIPES + 1][16];
  for (int i = 0; i <= CALIBRATE_MAX_RECIPES; i++) {
    snprintf(name[i], sizeof name[i], "%d.yaml", i);
    words[2 * i] = "--config";
    words[2 * i + 1] = name[i];
  }
  refuse_several(words, "--config: given more than 16 times");
  char output[CALIBRATE_PATH_BYTES];
  memset(output, 'x', sizeof output);
  output[CALIBRATE_PATH_BYTES - 1] = '\0';
  struct calibrate_recipe recipes[CALIBRATE_MAX_RECIPES];
  struct error error;
  struct arguments arguments;
  int count;
  assert_int_equal(parse(&arguments, &error, (const char *[]){NULL}), 0);
  arguments.calibrate.output = output;
  assert_int_equal(arguments_recipes(&arguments, recipes, &count, &error), 0);
  assert_string_equal(recipes[0].output, output);
  const char *a = config_file("a.yaml", "wbits: 3"), *b = config_file("b.yaml", "wbits: 3");
  output[CALIBRATE_PATH_BYTES - 2] = '\0'; /* with "/a" one byte too many */
  arguments.configs = (struct setting_texts){2, {a, b}};
  assert_int_equal(arguments_recipes(&arguments, recipes, &count, &error), ERROR_INPUT);
  assert_non_null(strstr(error.message, "names of more than 1023 bytes: choose a shorter one"));
  output[CALIBRATE_PATH_BYTES - 3] = '\0';
  error = (struct error){0};
  assert_int_equal(arguments_recipes(&arguments, recipes, &count, &error), 0);
  arguments_free(&arguments);
}

/* Bits of activations that eval takes. */
static void test_eval_bits(void **state) {
  (void)state;
  static const struct {
    const char *flag, *value;
    int code;
  } cases[] = {{"--abits", "0", 0},  {"--abits", "1", 2},   {"--abits", "2", 0},   {"--abits", "16", 0},
               {"--abits", "17", 2}, {"--kv-bits", "0", 0}, {"--kv-bits", "1", 2}, {"--kv-bits", "16", 0}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char line[8][16] = {"omniquant", "eval", "--model", "m", "--tokens", "t"}, *argv[9] = {NULL};
    struct arguments arguments = {0};
    struct error error = {0};
    const struct command *command;
    snprintf(line[6], sizeof line[6], "%s", cases[i].flag);
    snprintf(line[7], sizeof line[7], "%s", cases[i].value);
    for (int k = 0; k < 8; k++) argv[k] = line[k];
    assert_int_equal(arguments_parse(&arguments, commands, 8, argv, &command, &error), cases[i].code);
    if (cases[i].code != 0) continue;
    assert_int_equal(strcmp(cases[i].flag, "--abits") == 0 ? arguments.evaluate.abits : arguments.evaluate.kv_bits, atoi(cases[i].value));
  }
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
    const char *name = strrchr(found.gl_pathv[i], '/');
    if (sscanf(name, "/paper-w%da16g%d.yaml", &bits, &group) >= 1 && strstr(name, "a16") != NULL) {
      assert_int_equal(recipe.wbits, bits);
      assert_int_equal(recipe.group_size, group);
      assert_int_equal(recipe.epochs, bits == 2 ? 40 : 20);
      assert_int_equal(recipe.aug_loss, bits == 2);
      assert_int_equal(recipe.activations.abits, 16);
      assert_true(recipe.lwc && !recipe.let);
    } else if (sscanf(name, "/paper-w%da%d.yaml", &bits, &group) == 2) {
      assert_int_equal(recipe.wbits, bits);
      assert_int_equal(recipe.activations.abits, group);
      assert_int_equal(recipe.group_size, 0);
      assert_true(recipe.lwc && recipe.let);
    }
  }
  globfree(&found);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_defaults),
      cmocka_unit_test(test_kv_bits),
      cmocka_unit_test(test_table),
      cmocka_unit_test(test_load),
      cmocka_unit_test(test_load_partly),
      cmocka_unit_test(test_refused_values),
      cmocka_unit_test(test_refused_shape),
      cmocka_unit_test(test_refused_text),
      cmocka_unit_test(test_refused_file),
      cmocka_unit_test(test_long_value),
      cmocka_unit_test(test_bounds),
      cmocka_unit_test(test_check),
      cmocka_unit_test(test_json),
      cmocka_unit_test(test_from_json),
      cmocka_unit_test(test_every_flag),
      cmocka_unit_test(test_override),
      cmocka_unit_test_setup_teardown(test_several, make_folder, remove_folder),
      cmocka_unit_test_setup_teardown(test_refused_several, make_folder, remove_folder),
      cmocka_unit_test_setup_teardown(test_limits_of_several, make_folder, remove_folder),
      cmocka_unit_test(test_eval_bits),
      cmocka_unit_test(test_blocks),
      cmocka_unit_test(test_configs),
  };
  return cmocka_run_group_tests(tests, make_file, remove_file);
}
