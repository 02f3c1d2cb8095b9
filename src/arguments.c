/* arguments.c: the command line by argp. Messages of argp and getopt are caught, so that each failure is one line told once. */
#include "arguments.h"

#include <argp.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "printable.h"
#include "store.h"

/* Keys of options without a letter. Settings count from FLAG on, two each: --x and --no-x. */
enum { USAGE = 0x100, VERSION, FLAG };

/* A group of flags, made of a table of settings. */
struct group {
  const char *header;
  const struct setting *settings;
  size_t count;
  void *target;           /* struct that the table describes */
  const char **overrides; /* [count] receives the text of each flag given; NULL where nobody asks */

  struct error *error;         /* of the command line */
  struct argp argp;            /* made by group_open */
  struct argp_option *options; /* [2 * count + 1], owned */
  struct flag {
    char name[32], negation[32], help[160];
  } * flags; /* [count], owned */
};

/* What the parsers of one level of the command line share. */
struct parse {
  struct arguments *arguments;
  struct error *error;

  const struct command *commands; /* program: the table */
  const struct command *command;  /* found */
  int command_index;              /* in argv */

  struct group *groups; /* [group_count] subcommand: its flags */
  int group_count;
  const char **operand;     /* receives the one argument that is not a flag; NULL where there is none */
  const char *operand_name; /* in --help */
};

/* ---- --help, --usage, --version of every level ---- */

static const struct argp_option common_options[] = {{.name = "help", .key = 'h', .doc = "give this help list", .group = -1},
                                                    {.name = "usage", .key = USAGE, .doc = "give a short usage message"},
                                                    {.name = "version", .key = VERSION, .doc = "print the program's version"},
                                                    {0}};

static error_t parse_common(int key, char *argument, struct argp_state *state) {
  (void)argument;
  struct parse *parse = state->input;
  if (key != 'h' && key != USAGE && key != VERSION) return ARGP_ERR_UNKNOWN;
  parse->arguments->answered = true;
  if (parse->arguments->quiet) return ECANCELED;
  if (key == VERSION)
    puts("omniquant " OMNIQUANT_VERSION);
  else
    argp_state_help(state, stdout, key == USAGE ? ARGP_HELP_USAGE : ARGP_HELP_STD_HELP);
  return ECANCELED; /* nothing after it counts */
}

static const struct argp common = {.options = common_options, .parser = parse_common};

/* ---- flags of a table of settings ---- */

static void flag_name(char name[32], const char *prefix, const char *setting) {
  snprintf(name, 32, "%s%s", prefix, setting);
  for (; *name != '\0'; name++)
    if (*name == '_') *name = '-';
}

static error_t parse_flag(int key, char *argument, struct argp_state *state) {
  struct group *group = state->input;
  if (key < FLAG || key >= FLAG + 2 * (int)group->count) return ARGP_ERR_UNKNOWN;
  size_t i = (size_t)(key - FLAG) / 2;
  bool negated = (key - FLAG) % 2 != 0;
  char origin[40];
  snprintf(origin, sizeof origin, "--%s", negated ? group->flags[i].negation : group->flags[i].name);
  const char *text = argument != NULL ? argument : negated ? "false" : "true";
  if (setting_set(group->target, &group->settings[i], text, origin, group->error)) return EINVAL;
  if (group->overrides != NULL) group->overrides[i] = text;
  return 0;
}

static bool required(const struct setting *setting) {
  return setting->type == SETTING_TEXT && setting->min > 0;
}

/* Makes the option of one setting, and for a bool that can be undone its --no- twin. */
static struct argp_option *add_option(struct argp_option *option, const struct setting *setting, struct flag *flag, int key) {
  static const char *const numbers[] = {[SETTING_INT] = "N", [SETTING_INT64] = "N", [SETTING_REAL] = "X"};
  const char *argument = setting->choices;
  if (argument == NULL && setting->type != SETTING_BOOL) argument = numbers[setting->type];
  flag_name(flag->name, "", setting->name);
  if (setting->fallback != NULL)
    snprintf(flag->help, sizeof flag->help, "%s (default %s)", setting->help, setting->fallback);
  else
    snprintf(flag->help, sizeof flag->help, "%s%s", setting->help, required(setting) ? " (required)" : "");
  *option++ = (struct argp_option){.name = flag->name, .key = key, .arg = argument, .doc = flag->help};
  if (setting->type != SETTING_BOOL || setting->fallback == NULL) return option;
  flag_name(flag->negation, "no-", setting->name);
  *option++ = (struct argp_option){.name = flag->negation, .key = key + 1, .flags = OPTION_ALIAS};
  return option;
}

static int group_open(struct group *group, struct error *error) {
  group->error = error;
  group->options = calloc(2 * group->count + 1, sizeof *group->options);
  group->flags = calloc(group->count, sizeof *group->flags);
  if (group->options == NULL || group->flags == NULL) return error_set(error, ERROR_WORK, "no memory for the command line");
  struct argp_option *option = group->options;
  for (size_t i = 0; i < group->count; i++) option = add_option(option, &group->settings[i], &group->flags[i], FLAG + 2 * (int)i);
  group->argp = (struct argp){.options = group->options, .parser = parse_flag};
  setting_reset(group->target, group->settings, group->count);
  return 0;
}

static void group_close(struct group *group) {
  free(group->options);
  free(group->flags);
}

/* ---- running argp ---- */

/* Takes the first line of what argp said, without the program's name before it, as the one message. */
static void take_message(struct error *error, char *said, const char *program) {
  size_t prefix = strlen(program);
  if (strncmp(said, program, prefix) == 0 && strncmp(said + prefix, ": ", 2) == 0) said += prefix + 2;
  said[strcspn(said, "\n")] = '\0';
  error_set(error, ERROR_INPUT, "%s; see '%s --help'", *said != '\0' ? printable(said).text : "wrong usage", program);
}

/* Runs argp over one level of the command line. */
static int run_argp(const struct argp *argp, int argc, char **argv, unsigned flags, struct parse *parse) {
  char *said = NULL;
  size_t bytes;
  FILE *caught = open_memstream(&said, &bytes), *terminal = stderr;
  if (caught == NULL) return error_set(parse->error, ERROR_WORK, "no memory for the command line");
  stderr = caught; /* getopt inside argp writes there and nowhere else */
  error_t failed = argp_parse(argp, argc, argv, flags | ARGP_NO_EXIT | ARGP_NO_HELP, NULL, parse);
  stderr = terminal;
  if (fclose(caught) == 0 && failed && !parse->arguments->answered) take_message(parse->error, said, argv[0]);
  free(said);
  return parse->error->code;
}

/* ---- the program ---- */

static error_t parse_program(int key, char *argument, struct argp_state *state) {
  struct parse *parse = state->input;
  switch (key) {
  case ARGP_KEY_INIT:
    state->child_inputs[0] = parse;
    return 0;
  case ARGP_KEY_ARG:
    for (const struct command *c = parse->commands; c->name != NULL; c++)
      if (strcmp(c->name, argument) == 0) parse->command = c;
    if (parse->command == NULL)
      return error_set(parse->error, ERROR_INPUT, "'%s' is not a subcommand; 'omniquant --help' lists them", printable(argument).text);
    parse->command_index = state->next - 1;
    state->next = state->argc; /* the rest is the subcommand's own */
    return 0;
  case ARGP_KEY_NO_ARGS:
    return error_set(parse->error, ERROR_INPUT, "a subcommand is missing; 'omniquant --help' lists them");
  default:
    return ARGP_ERR_UNKNOWN;
  }
}

/* Reads the program's own options and finds the subcommand. */
static int find_command(struct parse *parse, int argc, char **argv) {
  enum { MOST = 16 };
  struct argp_option options[MOST + 2] = {{.doc = "Subcommands:", .group = 1}};
  for (int i = 0; i < MOST && parse->commands[i].name != NULL; i++)
    options[i + 1] = (struct argp_option){
        .name = parse->commands[i].name, .flags = OPTION_DOC | OPTION_NO_USAGE, .doc = parse->commands[i].summary, .group = 1};
  const struct argp_child children[] = {{.argp = &common}, {0}};
  const struct argp argp = {
      .options = options,
      .parser = parse_program,
      .args_doc = "SUBCOMMAND [ARGUMENT...]",
      .doc = "Quantizes large language models block by block with learned clipping and scaling (OmniQuant), data-parallel over MPI: "
             "start it under mpirun or srun to use more than one process.\v"
             "'omniquant SUBCOMMAND --help' tells the arguments of each.\n"
             "Exit status: 0 done, 1 failed at work, 2 wrong usage or input.",
      .children = children};
  return run_argp(&argp, argc, argv, ARGP_IN_ORDER, parse);
}

int arguments_parse(struct arguments *arguments, const struct command *commands, int argc, char **argv, const struct command **command,
                    struct error *error) {
  struct parse parse = {.arguments = arguments, .error = error, .commands = commands};
  char program[] = "omniquant", name[64];
  char *empty[] = {program, NULL};
  *command = NULL;
  if (argc < 1) { /* started without even a name */
    argc = 1;
    argv = empty;
  }
  char *first = argv[0];
  argv[0] = program;
  int code = find_command(&parse, argc, argv);
  argv[0] = first;
  if (code != 0 || arguments->answered) return code;

  char **own = argv + parse.command_index, *word = own[0];
  snprintf(name, sizeof name, "omniquant %s", parse.command->name);
  own[0] = name;
  code = parse.command->parse(arguments, argc - parse.command_index, own, error);
  own[0] = word;
  if (code == 0 && !arguments->answered) *command = parse.command;
  return code;
}

void arguments_free(struct arguments *arguments) {
  free(arguments->overrides);
  arguments->overrides = NULL;
}

/* ---- subcommands ---- */

static error_t parse_subcommand(int key, char *argument, struct argp_state *state) {
  struct parse *parse = state->input;
  switch (key) {
  case ARGP_KEY_INIT:
    state->child_inputs[0] = parse;
    for (int i = 0; i < parse->group_count; i++) state->child_inputs[i + 1] = &parse->groups[i];
    return 0;
  case ARGP_KEY_ARG:
    if (parse->operand == NULL || *parse->operand != NULL)
      return error_set(parse->error, ERROR_INPUT, "'%s' is one argument too many", printable(argument).text);
    *parse->operand = argument;
    return 0;
  default:
    return ARGP_ERR_UNKNOWN;
  }
}

/* Whether all that must be given is given. */
static int check_given(const struct parse *parse, struct error *error) {
  if (parse->operand != NULL && *parse->operand == NULL) return error_set(error, ERROR_INPUT, "%s is missing", parse->operand_name);
  for (int i = 0; i < parse->group_count; i++) {
    const struct group *group = &parse->groups[i];
    for (size_t k = 0; k < group->count; k++) {
      const struct setting *setting = &group->settings[k];
      if (required(setting) && *(const char *const *)((const char *)group->target + setting->offset) == NULL)
        return error_set(error, ERROR_INPUT, "--%s %s is missing: %s", group->flags[k].name, setting->choices, setting->help);
    }
  }
  return 0;
}

/* Reads the command line of one subcommand. */
static int run_subcommand(struct parse *parse, int argc, char **argv, const char *doc) {
  enum { MOST = 4 };
  struct argp_child children[MOST + 2] = {{.argp = &common}};
  int code = 0;
  for (int i = 0; i < parse->group_count && code == 0; i++) {
    code = group_open(&parse->groups[i], parse->error);
    children[i + 1] = (struct argp_child){.argp = &parse->groups[i].argp, .header = parse->groups[i].header, .group = i + 1};
  }
  const struct argp argp = {.parser = parse_subcommand, .args_doc = parse->operand_name, .doc = doc, .children = children};
  if (code == 0) code = run_argp(&argp, argc, argv, 0, parse);
  if (code == 0 && !parse->arguments->answered) code = check_given(parse, parse->error);
  for (int i = 0; i < parse->group_count; i++) group_close(&parse->groups[i]);
  return code;
}

#define COUNT(table) (sizeof(table) / sizeof((table)[0]))
#define AT(member)   offsetof(struct arguments, member)
#define REQUIRED     1, 1
#define OPTIONAL     0, 0
#define ANY_COUNT    0, 9007199254740991

static int check_backend(const char *backend, struct error *error) {
  if (strcmp(backend, "auto") == 0 || kernels_built_in(backend)) return 0;
  if (strcmp(backend, "cuda") == 0) return error_set(error, ERROR_INPUT, "--backend cuda: not built in; build with CUDA, or use cpu");
  return error_set(error, ERROR_INPUT, "--backend: '%s' is not one of auto|cpu|cuda", printable(backend).text);
}

static const struct setting calibrate_files[] = {
    {"model", SETTING_TEXT, AT(calibrate.model), REQUIRED, "DIR", NULL, "checkpoint folder with config.json and *.safetensors"},
    {"tokens", SETTING_TEXT, AT(calibrate.tokens), REQUIRED, "FILE", NULL, "calibration tokens as made by tools/tokenize.py"},
    {"config", SETTING_TEXTS, AT(configs), OPTIONAL, "FILE", NULL,
     "recipe in YAML; given several times, all are calibrated in one pass, into OUT/NAME-OF-FILE each"},
    {"output", SETTING_TEXT, AT(calibrate.output), REQUIRED, "OUT", NULL, "folder to make, for the quantized model in HDF5"},
};

static const struct setting calibrate_run[] = {
    {"resume", SETTING_BOOL, AT(calibrate.resume), 0, 1, NULL, NULL,
     "without recipe, go on with that of the run in OUT (a run that is given the same again goes on anyway)"},
    {"stream_checkpoint", SETTING_INT, AT(calibrate.stream_checkpoint), 0, 10000, NULL, "0",
     "keep the hidden states in OUT/streams every N blocks, to resume without replaying what is stored; 0: never"},
    {"blocks", SETTING_TEXT, AT(blocks), OPTIONAL, "A:B", NULL, "quantize blocks A to B - 1 only; either may be left out"},
    {"backend", SETTING_TEXT, AT(calibrate.backend), OPTIONAL, "auto|cpu|cuda", "auto",
     "what computes; auto: cuda where every rank has a GPU that it can use"},
    {"threads", SETTING_INT, AT(calibrate.threads), 0, 65536, NULL, "0", "threads a rank; 0: the node's cores over its ranks"},
};

/* Reads the digits at *text and moves behind them; none mean `fallback`. Returns -1 for more than any model has blocks. */
static int read_index(const char **text, int fallback) {
  int value = 0;
  if (**text < '0' || **text > '9') return fallback;
  for (; **text >= '0' && **text <= '9'; ++*text)
    if (value >= 0 && (value = 10 * value + (**text - '0')) > 1000000) value = -1;
  return value;
}

static int set_blocks(struct calibrate_options *options, const char *text, struct error *error) {
  const char *rest = text;
  int first = read_index(&rest, 0), end = -1;
  if (*rest == ':') {
    rest++;
    end = read_index(&rest, INT_MAX); /* "A:" runs to the last block */
  }
  if (*rest != '\0' || first < 0 || end <= first)
    return error_set(error, ERROR_INPUT, "--blocks: '%s' is not A:B with 0 <= A < B", printable(text).text);
  options->first_block = first;
  options->end_block = end == INT_MAX ? 0 : end;
  return 0;
}

/* The flags of a recipe, whose texts are kept. */
static int recipe_group(struct arguments *arguments, struct group *group, struct error *error) {
  size_t count;
  const struct setting *settings = recipe_settings(&count);
  arguments->overrides = calloc(count, sizeof *arguments->overrides);
  if (arguments->overrides == NULL) return error_set(error, ERROR_WORK, "no memory for the command line");
  *group = (struct group){.header = "Recipe (a flag overrides the file):",
                          .settings = settings,
                          .count = count,
                          .target = &arguments->flags,
                          .overrides = arguments->overrides};
  return 0;
}

int arguments_calibrate(struct arguments *arguments, int argc, char **argv, struct error *error) {
  struct group recipe;
  if (recipe_group(arguments, &recipe, error)) return error->code;
  struct group groups[] = {
      {.header = "Files:", .settings = calibrate_files, .count = COUNT(calibrate_files), .target = arguments},
      recipe,
      {.header = "Run:", .settings = calibrate_run, .count = COUNT(calibrate_run), .target = arguments},
  };
  struct parse parse = {.arguments = arguments, .error = error, .groups = groups, .group_count = COUNT(groups)};
  int code = run_subcommand(&parse, argc, argv,
                            "Quantizes a model block by block, learning on calibration tokens how its weights are clipped and scaled, and "
                            "writes OUT/omniquant.h5 and OUT/blocks/.\v"
                            "Example:\n"
                            "  mpirun -np 2 omniquant calibrate --model llama --tokens text.h5 \\\n"
                            "      --config paper-w3a16g128.yaml --output llama-w3\n\n"
                            "SIGTERM, SIGINT and SIGUSR1 stop it; what is stored is whole, and the same command goes on from there.\n\n"
                            "Exit status: 0 done, 1 failed at work, 2 wrong usage or input, 75 stopped by a signal or a rank's death.");
  if (code != 0 || arguments->answered) return code;
  if (check_backend(arguments->calibrate.backend, error)) return error->code;
  return arguments->blocks != NULL ? set_blocks(&arguments->calibrate, arguments->blocks, error) : 0;
}

/* The recipe of the run in OUT, if there is one. */
static int stored_recipe(const char *output, struct recipe *recipe, struct error *error) {
  struct error none = {0}, ignored = {0};
  struct store *store;
  if (store_open(output, &store, &none) && store_recover(output, &store, &ignored)) return 0;
  recipe_from_json(recipe, store_info(store)->recipe, output, error);
  return store_close(store, error);
}

/* The recipe of one file, or of none. */
static int read_recipe(const struct arguments *arguments, const char *config, struct recipe *recipe, struct error *error) {
  size_t count;
  const struct setting *settings = recipe_settings(&count);
  recipe_init(recipe);
  if (config != NULL && recipe_load(recipe, config, error)) return error->code;
  if (config == NULL && arguments->calibrate.resume && stored_recipe(arguments->calibrate.output, recipe, error)) return error->code;
  for (size_t i = 0; i < count; i++)
    if (arguments->overrides[i] != NULL && recipe_set(recipe, &settings[i], arguments->overrides[i], settings[i].name, error))
      return error->code;
  struct error wrong = {0};
  if (recipe_check(recipe, &wrong) == 0) return 0;
  bool several = arguments->configs.count > 1;
  return error_set(error, wrong.code, "%s%s%s", several ? printable(config).text : "", several ? ": " : "", wrong.message);
}

int arguments_plan_recipe(const struct arguments *arguments, struct recipe *recipe, struct error *error) {
  return read_recipe(arguments, arguments->configs.count > 0 ? arguments->configs.text[0] : NULL, recipe, error);
}

/* The name of a recipe file without folder and ending: *length bytes of the result. */
static const char *recipe_name(const char *config, size_t *length) {
  static const char *const endings[] = {".yaml", ".yml"};
  const char *slash = strrchr(config, '/'), *name = slash != NULL ? slash + 1 : config;
  *length = strlen(name);
  for (size_t i = 0; i < COUNT(endings); i++) {
    size_t ending = strlen(endings[i]);
    if (*length < ending || strcmp(name + *length - ending, endings[i]) != 0) continue;
    *length -= ending;
    break;
  }
  return name;
}

/* Names the store of one recipe of the pass; those before it are named. */
static int name_output(const struct arguments *arguments, struct calibrate_recipe *recipes, int index, struct error *error) {
  const char *folder = arguments->calibrate.output, *const *config = arguments->configs.text, *name = "";
  size_t length = 0;
  bool several = arguments->configs.count > 1;
  if (several) name = recipe_name(config[index], &length);
  if (several && (length == 0 || strncmp(name, "..", length) == 0)) /* "", "." and ".." */
    return error_set(error, ERROR_INPUT, "%s: no folder can be named after it: rename it", printable(config[index]).text);
  char *output = recipes[index].output;
  int written = snprintf(output, CALIBRATE_PATH_BYTES, "%s%s%.*s", folder, several ? "/" : "", (int)length, name);
  if (written >= CALIBRATE_PATH_BYTES)
    return error_set(error, ERROR_INPUT, "--output: '%s' and what is in it have names of more than %d bytes: choose a shorter one",
                     printable(folder).text, CALIBRATE_PATH_BYTES - 1);
  for (int i = 0; i < index; i++)
    if (strcmp(recipes[i].output, output) == 0)
      return error_set(error, ERROR_INPUT, "%s and %s: both would be stored as %s: rename one", printable(config[i]).text,
                       printable(config[index]).text, printable(output).text);
  return 0;
}

/* Recipes of one pass share its samples and the steps through them. */
static int check_shared(const struct arguments *arguments, const struct calibrate_recipe *recipes, int index, struct error *error) {
  static const char *const shared[] = {"samples", "seqlen", "sampling", "seed", "batch"};
  const char *const *config = arguments->configs.text;
  size_t count;
  const struct setting *settings = recipe_settings(&count);
  for (size_t i = 0; i < COUNT(shared); i++)
    if (!recipe_same(&recipes[0].recipe, &recipes[index].recipe, setting_find(settings, count, shared[i])))
      return error_set(error, ERROR_INPUT, "%s and %s: %s differs, which all recipes of one pass share: give it as --%s, or run them apart",
                       printable(config[0]).text, printable(config[index]).text, shared[i], shared[i]);
  return 0;
}

int arguments_recipes(const struct arguments *arguments, struct calibrate_recipe recipes[CALIBRATE_MAX_RECIPES], int *count,
                      struct error *error) {
  const struct setting_texts *configs = &arguments->configs;
  _Static_assert((int)CALIBRATE_MAX_RECIPES == (int)SETTING_MAX_TEXTS, "each --config has its recipe");
  *count = configs->count > 1 ? configs->count : 1;
  memset(recipes, 0, CALIBRATE_MAX_RECIPES * sizeof *recipes);
  for (int i = 0; i < *count && error->code == 0; i++) {
    if (read_recipe(arguments, configs->count > 0 ? configs->text[i] : NULL, &recipes[i].recipe, error)) break;
    if (name_output(arguments, recipes, i, error)) break;
    if (i > 0) check_shared(arguments, recipes, i, error);
  }
  return error->code;
}

static int check_bits(const char *flag, int bits, struct error *error) {
  return bits == 1 ? error_set(error, ERROR_INPUT, "%s: 1 is neither 0 nor in 2..16", flag) : 0;
}

static const struct setting eval_files[] = {
    {"model", SETTING_TEXT, AT(evaluate.model), REQUIRED, "DIR", NULL, "checkpoint folder with config.json and *.safetensors"},
    {"quantized", SETTING_TEXT, AT(evaluate.quantized), OPTIONAL, "OUT", NULL,
     "folder that calibrate made; without it the model is evaluated in full precision"},
    {"tokens", SETTING_TEXT, AT(evaluate.tokens), REQUIRED, "FILE", NULL, "text to predict, as made by tools/tokenize.py"},
};

static const struct setting eval_windows[] = {
    {"seqlen", SETTING_INT, AT(evaluate.seqlen), 2, 1 << 24, NULL, "2048", "tokens a window"},
    {"offset", SETTING_INT64, AT(evaluate.offset), ANY_COUNT, NULL, "0", "first token of the first window"},
    {"windows", SETTING_INT, AT(evaluate.windows), 0, INT_MAX, NULL, "0", "consecutive windows; 0: as many as the file holds"},
};

static const struct setting eval_activations[] = {
    {"abits", SETTING_INT, AT(evaluate.abits), 0, 16, NULL, "0",
     "bits of the activations that linear layers read; 0: as the recipe in OUT says, 16 without OUT"},
    {"kv_bits", SETTING_INT, AT(evaluate.kv_bits), 0, 16, NULL, "0",
     "bits of queries, keys and values; 0: as the recipe in OUT says, else as abits"},
};

static const struct setting eval_run[] = {
    {"json", SETTING_BOOL, AT(evaluate.json), 0, 1, NULL, NULL, "print one JSON object"},
    {"backend", SETTING_TEXT, AT(evaluate.backend), OPTIONAL, "auto|cpu|cuda", "auto",
     "what computes; auto: cuda where every rank has a GPU that it can use"},
    {"threads", SETTING_INT, AT(evaluate.threads), 0, 65536, NULL, "0", "threads a rank; 0: the node's cores over its ranks"},
};

int arguments_eval(struct arguments *arguments, int argc, char **argv, struct error *error) {
  struct group groups[] = {
      {.header = "Files:", .settings = eval_files, .count = COUNT(eval_files), .target = arguments},
      {.header = "Text:", .settings = eval_windows, .count = COUNT(eval_windows), .target = arguments},
      {.header = "Activations:", .settings = eval_activations, .count = COUNT(eval_activations), .target = arguments},
      {.header = "Run:", .settings = eval_run, .count = COUNT(eval_run), .target = arguments},
  };
  struct parse parse = {.arguments = arguments, .error = error, .groups = groups, .group_count = COUNT(groups)};
  int code = run_subcommand(&parse, argc, argv,
                            "Measures perplexity over consecutive windows that do not overlap, of the model as it is or as quantized.\v"
                            "Exit status: 0 done, 1 failed at work, 2 wrong usage or input.");
  if (code != 0 || arguments->answered) return code;
  if (check_bits("--abits", arguments->evaluate.abits, error) || check_bits("--kv-bits", arguments->evaluate.kv_bits, error))
    return error->code;
  return check_backend(arguments->evaluate.backend, error);
}

static const struct setting export_files[] = {
    {"model", SETTING_TEXT, AT(export.model), REQUIRED, "DIR", NULL, "checkpoint folder that the store was made from"},
    {"quantized", SETTING_TEXT, AT(export.quantized), REQUIRED, "OUT", NULL, "folder that calibrate made"},
    {"format", SETTING_TEXT, AT(export.format), REQUIRED, "gptq|compressed-tensors|gguf|hf", NULL, "what to write"},
    {"output", SETTING_TEXT, AT(export.output), REQUIRED, "PATH", NULL, "folder to make"},
    {"result", SETTING_TEXTS, AT(export.results), OPTIONAL, "FILE", NULL, "what eval --json printed, for the model card; may be repeated"},
    {"shard_size", SETTING_INT, AT(export.shard_mib), 1, 1 << 20, NULL, "4096", "MiB of a safetensors file at most"},
};

static const struct setting export_formats_settings[] = {
    {"checkpoint_format", SETTING_ENUM, AT(export.gptq), 0, 0, "auto|gptq|gptq_v2", "auto",
     "gptq: how zero points are stored; auto: gptq for symmetric weights, else gptq_v2"},
    {"dtype", SETTING_ENUM, AT(export.dtype), 0, 0, "auto|float16|bfloat16|float32", "auto",
     "hf: type of the weights; auto: bfloat16 where the model is, else float16"},
    {"f16_fallback", SETTING_BOOL, AT(export.f16_fallback), 0, 1, NULL, NULL,
     "gguf: write layers as F16 that its types cannot hold, instead of refusing"},
    {"exact", SETTING_BOOL, AT(export.exact), 0, 1, NULL, NULL,
     "gguf: only types that round nothing: asymmetric 4 bits as Q5_0, 5 bits as Q8_0"},
    {"embedding", SETTING_ENUM, AT(export.embedding), 0, 0, "f16|q8_0", "f16",
     "gguf: type of embedding and head, which are not quantized otherwise; q8_0 rounds them to 8 bits in blocks of 32"},
    {"pre_tokenizer", SETTING_TEXT, AT(export.pretokenizer), OPTIONAL, "NAME", NULL,
     "gguf: llama.cpp's name of how text is split, where tokenizer.json does not tell"},
};

int arguments_export(struct arguments *arguments, int argc, char **argv, struct error *error) {
  struct group groups[] = {
      {.header = "Files:", .settings = export_files, .count = COUNT(export_files), .target = arguments},
      {.header = "Of single formats:", .settings = export_formats_settings, .count = COUNT(export_formats_settings), .target = arguments},
  };
  struct parse parse = {.arguments = arguments, .error = error, .groups = groups, .group_count = COUNT(groups)};
  return run_subcommand(
      &parse, argc, argv,
      "Writes what calibrate made as inference engines read it: a folder with weights, tokenizer and model card. It appears "
      "whole or not at all. What a format cannot hold is refused before anything is written.\v"
      "Exit status: 0 done, 1 failed at work, 2 wrong usage or input.");
}

static const struct setting inspect_output[] = {
    {"json", SETTING_BOOL, AT(json), 0, 1, NULL, NULL, "print one JSON object"},
};

int arguments_inspect(struct arguments *arguments, int argc, char **argv, struct error *error) {
  struct group groups[] = {{.header = "Output:", .settings = inspect_output, .count = COUNT(inspect_output), .target = arguments}};
  struct parse parse = {.arguments = arguments,
                        .error = error,
                        .groups = groups,
                        .group_count = COUNT(groups),
                        .operand = &arguments->store,
                        .operand_name = "OUT"};
  return run_subcommand(&parse, argc, argv,
                        "Shows what the folder OUT that calibrate made holds: the recipe and, a line a block, the losses, what was kept, "
                        "bits a weight and seconds. Reads every block and so verifies its checksums.\v"
                        "Exit status: 0 done, 1 failed at work, 2 wrong usage or input.");
}

static const struct setting plan_files[] = {
    {"model", SETTING_TEXT, AT(plan.model), REQUIRED, "DIR", NULL, "folder with config.json; with safetensors, their headers are read"},
    {"config", SETTING_TEXTS, AT(configs), OPTIONAL, "FILE", NULL, "recipe in YAML"},
};

static const struct setting plan_machine[] = {
    {"ranks", SETTING_INT, AT(plan.ranks), 1, 1 << 20, NULL, "1", "ranks of the run"},
    {"ranks_a_node", SETTING_INT, AT(plan.ranks_a_node), 0, 1024, NULL, "0", "ranks of each node; 0: as the machine has"},
    {"gpu", SETTING_TEXT, AT(plan.gpu), OPTIONAL, "h100|h200|a100|FILE", NULL,
     "one GPU a rank, or a JSON file of a machine's figures; without: CPUs"},
    {"measured", SETTING_TEXT, AT(plan.measured), OPTIONAL, "FILE", NULL,
     "JSON of figures that were measured, as --measure writes them, which replace the machine's"},
    {"measure", SETTING_TEXT, AT(plan.measure), OPTIONAL, "FILE", NULL,
     "time the operations of one block on this host, with random weights, plan with that, and keep it in FILE"},
    {"backend", SETTING_TEXT, AT(plan.backend), OPTIONAL, "auto|cpu|cuda", "auto", "what --measure times; auto: cuda where there is a GPU"},
    {"threads", SETTING_INT, AT(plan.threads), 1, 65536, NULL, "1", "threads a rank, where CPUs compute"},
    {"json", SETTING_BOOL, AT(plan.json), 0, 1, NULL, NULL, "print one JSON object"},
};

int arguments_plan(struct arguments *arguments, int argc, char **argv, struct error *error) {
  struct group recipe;
  if (recipe_group(arguments, &recipe, error)) return error->code;
  struct group groups[] = {
      {.header = "Files:", .settings = plan_files, .count = COUNT(plan_files), .target = arguments},
      recipe,
      {.header = "Machine:", .settings = plan_machine, .count = COUNT(plan_machine), .target = arguments},
  };
  struct parse parse = {.arguments = arguments, .error = error, .groups = groups, .group_count = COUNT(groups)};
  int code = run_subcommand(&parse, argc, argv,
                            "Tells what a calibration will take before it starts: memory of a rank, disk, traffic, time by part, and what "
                            "limits it. Reads no weights and needs no GPU.\v"
                            "Example:\n"
                            "  omniquant plan --model llama-70b --config paper-w3a16g128.yaml --ranks 8 --batch 8 --gpu h100\n\n"
                            "Exit status: 0 done, 1 failed at work, 2 wrong usage or input.");
  if (code != 0 || arguments->answered) return code;
  if (arguments->configs.count > 1) return error_set(error, ERROR_INPUT, "--config: one recipe can be planned at a time");
  return check_backend(arguments->plan.backend, error);
}

static const struct setting verify_flags[] = {
    {"repair", SETTING_BOOL, AT(verify.repair), 0, 1, NULL, NULL, "make a damaged or missing OUT/omniquant.h5 anew from the block files"},
    {"json", SETTING_BOOL, AT(verify.json), 0, 1, NULL, NULL, "print one JSON object"},
};

int arguments_verify(struct arguments *arguments, int argc, char **argv, struct error *error) {
  struct group groups[] = {{.header = "What to do:", .settings = verify_flags, .count = COUNT(verify_flags), .target = arguments}};
  struct parse parse = {.arguments = arguments,
                        .error = error,
                        .groups = groups,
                        .group_count = COUNT(groups),
                        .operand = &arguments->verify.folder,
                        .operand_name = "OUT"};
  return run_subcommand(
      &parse, argc, argv,
      "Checks the folder OUT that calibrate made: every checksum, shapes against the model's, bits and groups against the "
      "recipe's, and says which blocks are whole.\v"
      "Exit status: 0 all blocks are there and whole, 1 some are damaged or missing, 2 wrong usage, or no store.");
}
