/* arguments.h: the command line: from argv to what each subcommand needs. Opens no file and needs no MPI, so that wrong usage is told at
 * once and the same on every rank. */
#ifndef OMNIQUANT_ARGUMENTS_H
#define OMNIQUANT_ARGUMENTS_H

#include <stdbool.h>
#include <stddef.h>

#include "calibrate.h"
#include "error.h"
#include "evaluate.h"
#include "export.h"
#include "plan.h"
#include "recipe.h"
#include "verify.h"

struct arguments {
  bool quiet;    /* in: print no help or version, another rank does */
  bool answered; /* out: --help, --usage or --version was asked and printed: nothing is left to do */

  struct calibrate_options calibrate;
  struct setting_texts configs; /* recipe files of calibrate and plan */
  const char *blocks;           /* "A:B" of calibrate, or NULL */
  struct recipe flags;          /* scratch: recipe flags are read into it to be checked where they stand */
  const char **overrides;       /* [settings of a recipe] text of the recipe flags given, NULL for those not given; owned */

  struct evaluate_options evaluate;

  struct export_options export;

  const char *store; /* of inspect */
  bool json;

  struct verify_options verify;

  struct plan_options plan;
};

struct world;

/* A subcommand. One row of the table in main.c. */
struct command {
  const char *name;
  const char *summary;                                             /* one line for omniquant --help */
  bool collective;                                                 /* runs on all ranks under MPI; else on one process without it */
  int (*parse)(struct arguments *arguments, int argc, char **argv, /* argv[0]: "omniquant NAME", for messages and help */
               struct error *error);
  int (*run)(struct world *world, /* NULL unless collective */
             const struct arguments *arguments, struct error *error);
};

/* Finds the subcommand in argv and reads its arguments. *command is NULL on failure and when --help or --version was answered.
 * Failures are ERROR_INPUT. argv may be reordered. */
int arguments_parse(struct arguments *arguments, const struct command *commands, /* ends with a row without a name */
                    int argc, char **argv, const struct command **command, struct error *error);

void arguments_free(struct arguments *arguments);

/* Parsers for the table's rows. */
int arguments_calibrate(struct arguments *arguments, int argc, char **argv, struct error *error);
int arguments_eval(struct arguments *arguments, int argc, char **argv, struct error *error);
int arguments_export(struct arguments *arguments, int argc, char **argv, struct error *error);
int arguments_inspect(struct arguments *arguments, int argc, char **argv, struct error *error);
int arguments_verify(struct arguments *arguments, int argc, char **argv, struct error *error);
int arguments_plan(struct arguments *arguments, int argc, char **argv, struct error *error);

/* The recipe to be planned: defaults, then the file, then the flags. Reads the file. */
int arguments_plan_recipe(const struct arguments *arguments, struct recipe *recipe, struct error *error);

/* Makes the recipes of a calibration, one for each --config or one without: defaults (with --resume, what the store in OUT says), then the file, then the flags, whatever their order
 * was; checked, by themselves and against each other. Of several the store is OUT/NAME, NAME being that of the file without .yaml.
 * Reads the files. */
int arguments_recipes(const struct arguments *arguments, struct calibrate_recipe recipes[CALIBRATE_MAX_RECIPES], /* every byte assigned */
                      int *count, struct error *error);

#endif
