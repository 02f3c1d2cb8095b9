/* test_faults.c: whatever call fails, a calibration ends with a message, leaves only whole blocks, and the same command then makes what a run
 * without failures makes. Every n-th call of each kind is tried until a run comes through; with OMNIQUANT_FAULT_STEP=K every K-th. One rank;
 * tests/faults.sh has two. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>

#include "calibrate.h"
#include "faults.h"
#include "same_store.h"
#include "scratch.h"
#include "world.h"

enum { BLOCKS = 2, MOST_FAILURES = 100000 };

static struct world world;
static struct path folder;
static struct path reference;
/* What the next run is to suffer (armed_n 0: nothing), and how many such calls it made. */
static enum fault armed_kind;
static long armed_n, failing_calls;

/* A recipe with everything that allocates and writes. */
static struct calibrate_recipe make_recipe(const char *output) {
  struct calibrate_recipe r = {0};
  recipe_init(&r.recipe);
  r.recipe.wbits = 3;
  r.recipe.group_size = 16;
  r.recipe.activations.abits = 8;
  r.recipe.let = true;
  r.recipe.aug_loss = true;
  r.recipe.lwc_init = LWC_INIT_SEARCH;
  r.recipe.epochs = 1;
  r.recipe.samples = 2;
  r.recipe.seqlen = 8;
  snprintf(r.output, sizeof r.output, "%s", output);
  return r;
}

/* Sends a standard stream to /dev/null, and back again. */
static int silence(FILE *stream) {
  fflush(stream);
  int kept = dup(fileno(stream)), null = open("/dev/null", O_WRONLY | O_CLOEXEC);
  dup2(null, fileno(stream));
  close(null);
  return kept;
}

static void restore(FILE *stream, int kept) {
  fflush(stream);
  dup2(kept, fileno(stream));
  close(kept);
}

static int calibrate_in_silence(const struct calibrate_options *options, const struct calibrate_recipe *recipe, struct error *error) {
  int out = silence(stdout), err = silence(stderr);
  fault_arm(armed_kind, armed_n);
  int code = calibrate(&world, options, recipe, 1, error);
  if (armed_n) failing_calls = fault_calls();
  fault_arm(armed_kind, 0);
  restore(stdout, out);
  restore(stderr, err);
  return code;
}

static int run(const char *output, struct error *error) {
  struct path tokens = scratch_path(&folder, "tokens.h5");
  struct calibrate_recipe recipe = make_recipe(output);
  struct calibrate_options options = {
      .model = FIXTURES "/llama_gqa_tied", .tokens = tokens.text, .output = output, .stream_checkpoint = 1, .backend = "cpu", .threads = 1};
  return calibrate_in_silence(&options, &recipe, error);
}

/* No name that a writer leaves only when it is killed. */
static void check_no_leftovers(const char *path) {
  DIR *stream = opendir(path);
  for (struct dirent *entry; stream && (entry = readdir(stream));)
    if (strncmp(entry->d_name, ".omniquant", 10) == 0) fail_msg("%s/%s is left", path, entry->d_name);
  if (stream) closedir(stream);
}

/* What a failed run has left: nothing, or a store of whole blocks. */
static void check_remains(const char *output) {
  struct error error = {0};
  struct store *store;
  struct path out = {0};
  snprintf(out.text, sizeof out.text, "%s", output);
  check_no_leftovers(output);
  check_no_leftovers(scratch_path(&out, "blocks").text);
  if (scratch_count(output) <= 0) return;
  if (store_open(output, &store, &error)) fail_msg("%s", error.message);
  for (int i = 0; i < BLOCKS; i++) {
    struct block_record record;
    if (!store_has_block(store, i)) continue;
    if (store_read_block(store, i, &record, &error)) fail_msg("%s", error.message);
    block_record_free(&record);
  }
  store_close(store, &error);
}

/* Sets the folder's state before each run: nothing there, or a first block, taken from the reference. */
static void prepare(const char *output, bool begun) {
  struct error error = {0};
  struct path out = {0};
  snprintf(out.text, sizeof out.text, "%s", output);
  scratch_free(&out);
  if (!begun) return;
  if (run(output, &error)) fail_msg("%s", error.message);
  if (remove(scratch_path(&out, "blocks/0001.h5").text)) fail_msg("the second block is not there");
}

/* Fails call after call of one kind; how many runs failed. */
static long fail_all(enum fault kind, bool begun, long step) {
  struct path out = scratch_path(&folder, "out");
  long failures = 0;
  for (long n = 1;; n += step) {
    struct error error = {0}, again = {0};
    prepare(out.text, begun);
    armed_kind = kind;
    armed_n = n;
    int code = run(out.text, &error);
    armed_n = 0;
    bool failed = failing_calls >= n;
    if (code && !failed) fail_msg("%s %ld: failed by itself: %s", fault_names[kind], n, error.message);
    if (code && (!*error.message || strchr(error.message, '\n'))) fail_msg("%s %ld: no message of one line", fault_names[kind], n);
    if (kind == FAULT_HICCUP && code) fail_msg("%s %ld: not outlasted: %s", fault_names[kind], n, error.message);
    check_remains(out.text);
    if (code && run(out.text, &again)) fail_msg("%s %ld: %s; and then: %s", fault_names[kind], n, error.message, again.message);
    if (!same_store(reference.text, out.text)) fail_msg("%s %ld: other codes, after: %s", fault_names[kind], n, error.message);
    check_no_leftovers(out.text);
    if (!failed) return failures;
    failures += code != 0;
    assert_true(n < MOST_FAILURES);
  }
}

#ifdef __SANITIZE_ADDRESS__
enum { STEP = 5 }; /* slower */
#else
enum { STEP = 1 };
#endif
enum { HICCUP_STEP = 20 }; /* times that: each takes a pause */

static void every_call_may_fail(void **state) {
  (void)state;
  const char *text = getenv("OMNIQUANT_FAULT_STEP");
  long step = text && atol(text) > 0 ? atol(text) : STEP;
  for (int kind = 0; kind < FAULT_COLLECTIVE; kind++)
    for (int begun = 0; begun < 2; begun++) {
      long failures = fail_all((enum fault)kind, begun, kind == FAULT_HICCUP ? step * HICCUP_STEP : step);
      print_message("    %s, %s run: %ld calls failed it\n", fault_names[kind], begun ? "resumed" : "new", failures);
      if (kind != FAULT_HICCUP) assert_true(failures > 0);
    }
}

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>

/* Once Open MPI has unloaded its plugins, its own leaks cannot be told by their names: they are looked for before. */
const char *__lsan_default_options(void);
const char *__lsan_default_options(void) {
  return "leak_check_at_exit=0";
}

/* Memory that was allocated by a function of this project and is lost after all those failures. */
static void nothing_of_ours_is_leaked(void **state) {
  (void)state;
  char name[500];
  size_t length;
  struct path report = scratch_path(&folder, "leaks");
  __sanitizer_set_report_path(report.text);
  if (!__lsan_do_recoverable_leak_check()) return;
  __sanitizer_set_report_path("stderr");
  snprintf(name, sizeof name, "%s.%d", report.text, (int)getpid());
  char *text = (char *)scratch_read(name, &length);
  text[length] = 0;
  if (strstr(text, SOURCE_FOLDER)) fail_msg("%s", text);
  free(text);
}
#endif

static int setup(void **state) {
  (void)state;
  struct error error = {0};
  if (access("/dev/shm", W_OK) == 0) setenv("TMPDIR", "/dev/shm", 0); /* thousands of fsyncs */

  char *arguments[] = {(char *)"test_faults", NULL}, **argv = arguments;
  int argc = 1;
  if (world_init(&world, &argc, &argv, &error)) return -1;
  folder = scratch_init();
  reference = scratch_path(&folder, "reference");
  char command[1200];
  snprintf(command, sizeof command, "%s tokens %s/tokens.h5 200 96 1", getenv("TEST_HELPER") ? getenv("TEST_HELPER") : "./test_helper",
           folder.text);
  if (system(command) != 0 || run(reference.text, &error)) { /* NOLINT(cert-env33-c): a command of this test's own */
    fprintf(stderr, "%s\n", error.message);
    return -1;
  }
  return 0;
}

static int teardown(void **state) {
  (void)state;
  scratch_free(&folder);
  world_finalize(&world);
  return 0;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_call_may_fail),
#ifdef __SANITIZE_ADDRESS__
      cmocka_unit_test(nothing_of_ours_is_leaked),
#endif
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
