/* main.c: the subcommands, and what stands around each: arguments, MPI, the one error message and the exit status. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arguments.h"
#include "calibrate.h"
#include "device.h"
#include "evaluate.h"
#include "export.h"
#include "inspect.h"
#include "world.h"

/* Only rank 0 needs to see the recipe files. */
static int run_calibrate(struct world *world, const struct arguments *arguments, struct error *error) {
  struct calibrate_recipe recipes[CALIBRATE_MAX_RECIPES];
  int count = 0;
  if (world->rank == 0) arguments_recipes(arguments, recipes, &count, error);
  if (world_agree(world, error)) return error->code;
  world_broadcast(world, &count, sizeof count);
  world_broadcast(world, recipes, (size_t)count * sizeof *recipes);
  struct calibrate_options options = arguments->calibrate;
  options.backend = device_choose(world, options.backend, error);
  return options.backend ? calibrate(world, &options, recipes, count, error) : error->code;
}

static int run_eval(struct world *world, const struct arguments *arguments, struct error *error) {
  struct evaluate_options options = arguments->evaluate;
  options.backend = device_choose(world, options.backend, error);
  return options.backend ? evaluate(world, &options, error) : error->code;
}

static int run_export(struct world *world, const struct arguments *arguments, struct error *error) {
  (void)world;
  return export_model(&arguments->export, error);
}

static int run_inspect(struct world *world, const struct arguments *arguments, struct error *error) {
  (void)world;
  return inspect(arguments->store, arguments->json, error);
}

static int run_verify(struct world *world, const struct arguments *arguments, struct error *error) {
  (void)world;
  return verify(&arguments->verify, error);
}

static int run_plan(struct world *world, const struct arguments *arguments, struct error *error) {
  struct recipe recipe;
  (void)world;
  return arguments_plan_recipe(arguments, &recipe, error) ? error->code : plan_print(&arguments->plan, &recipe, error);
}

static const struct command commands[] = {
    {"plan", "tell what a calibration will take: memory, disk, traffic, time", false, arguments_plan, run_plan},
    {"calibrate", "quantize a model and store it", true, arguments_calibrate, run_calibrate},
    {"eval", "measure the perplexity of a model, quantized or not", true, arguments_eval, run_eval},
    {"export", "write a quantized model as inference engines read it", false, arguments_export, run_export},
    {"inspect", "show what a quantized model holds", false, arguments_inspect, run_inspect},
    {"verify", "check that a quantized model is whole", false, arguments_verify, run_verify},
    {0},
};

/* This process's rank as its launcher put it into the environment, known before MPI starts; -1 without a launcher. */
static int launcher_rank(void) {
  static const char *const variables[] = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PALS_RANKID", "SLURM_PROCID"};
  for (size_t i = 0; i < sizeof variables / sizeof *variables; i++) {
    const char *value = getenv(variables[i]);
    if (value != NULL && *value != '\0') return atoi(value);
  }
  return -1;
}

/* Ends the program's output. Returns the exit status. */
static int report(int rank, struct error *error) {
  if (rank > 0) return error->code;
  if (fflush(stdout) != 0 || ferror(stdout)) error_set(error, ERROR_WORK, "standard output: %s", strerror(errno));
  if (error->code != 0) fprintf(stderr, "omniquant: %s\n", error->message);
  return error->code;
}

/* Runs under MPI, also to fail: a rank that ended alone would make the launcher kill rank 0 before it could say why. */
static int run_collective(const struct command *command, const struct arguments *arguments, int *argc, char ***argv, struct error *error) {
  struct world world = {0};
  struct error start = {0};
  if (world_init(&world, argc, argv, &start)) return report(launcher_rank(), error->code != 0 ? error : &start);
  if (world_agree(&world, error) == 0) world_watch(&world); /* one rank alone may have had no memory for its command line */
  /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): without an error there is a command */
  if (error->code == 0) command->run(&world, arguments, error);
  int code = report(world.rank, error);
  world_finalize(&world);
  return code;
}

int main(int argc, char **argv) {
  int rank = launcher_rank();
  struct error error = {0};
  struct arguments arguments = {.quiet = rank > 0};
  const struct command *command;
  arguments_parse(&arguments, commands, argc, argv, &command, &error);

  bool failed = error.code != 0, alone = command != NULL && !command->collective;
  int code;
  if (arguments.answered || (failed && rank < 0)) {
    code = report(rank, &error); /* at once, without MPI */
  } else if (alone) {
    if (rank <= 0) command->run(NULL, &arguments, &error);
    code = report(rank, &error);
  } else {
    code = run_collective(command, &arguments, &argc, &argv, &error);
  }
  arguments_free(&arguments);
  return code;
}
