/* record.cu: work that is the same in every step is recorded as a CUDA graph and launched whole. */
#include "cuda/device.h"

/* What `repeat` keeps between its calls. */
struct record {
  cudaGraphExec_t graph; /* NULL: to be recorded */
  const char *scratch;   /* that the graph's kernels use */
  bool settled;          /* work has been called once: scratch is as large and algorithms are chosen as it needs */
};

static void record_drop(struct kernels *k, struct record *record) {
  if (record->graph) cuda_check(k, cudaGraphExecDestroy(record->graph), "freeing a graph");
  record->graph = NULL;
}

/* Calls work while the stream notes what it asks for. False, and nothing done, where it would have to grow the scratch memory. */
static bool record_make(struct kernels *k, struct record *record, void (*work)(void *context), void *context) {
  struct backend *cuda = k->state;
  cudaGraph_t graph = NULL;
  if (!cuda_check(k, cudaStreamBeginCapture(cuda_stream(k), cudaStreamCaptureModeThreadLocal), "recording")) return false;
  cuda->recording = true;
  cuda->outgrown = false;
  work(context);
  cuda->recording = false;
  if (!cuda_check(k, cudaStreamEndCapture(cuda_stream(k), &graph), "recording")) return false;
  if (!cuda->outgrown && cuda_check(k, cudaGraphInstantiate(&record->graph, graph, 0), "making a graph")) record->scratch = cuda->scratch;
  cuda_check(k, cudaGraphDestroy(graph), "freeing a graph");
  return record->graph != NULL;
}

static void repeat(struct kernels *k, void **recording, void (*work)(void *context), void *context) {
  struct record *record = (struct record *)*recording;
  if (!record) *recording = record = (struct record *)calloc(1, sizeof *record);
  if (record && record->graph && record->scratch != k->state->scratch) record_drop(k, record); /* another operation has grown it since */
  bool ready = record && (record->graph || (record->settled && !k->state->profile && record_make(k, record, work, context)));
  if (record) record->settled = true;
  if (ready && !k->state->profile)
    cuda_check(k, cudaGraphLaunch(record->graph, cuda_stream(k)), "launching a graph");
  else
    work(context);
}

static void forget(struct kernels *k, void *recording) {
  if (recording) record_drop(k, (struct record *)recording);
  free(recording);
}
