/* card.c: the model card in the form that model hubs read: YAML between dashes, then Markdown. */
#include "card.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "printable.h"

/* How each format is loaded; docs/deploy.md says more. */
static const struct {
  const char *format, *library, *text;
} uses[] = {
    {"gptq", "transformers",
     "Loads with GPTQModel (`GPTQModel.load(DIR)`), with transformers where GPTQModel and optimum are installed, and with vLLM where "
     "weights are "
     "symmetric and of 4 or 8 bits.\n"},
    {"compressed-tensors", "transformers",
     "Loads with vLLM (`vllm serve DIR`) and, where compressed-tensors is installed, with transformers "
     "(`AutoModelForCausalLM.from_pretrained(DIR)`).\n"},
    {"gguf", "gguf", "Loads with llama.cpp (`llama-cli -m DIR/model.gguf`) and what is built on it.\n"},
    {"hf", "transformers",
     "An ordinary model folder: the weights are the quantized ones, written out. It takes as much memory as the full-precision model, and "
     "loads "
     "wherever that does.\n"},
};

static void write_head(FILE *out, const struct export_options *options, const struct export_job *job) {
  fprintf(out, "---\nbase_model: \"%s\"\nbase_model_relation: quantized\n", printable(job->name).text);
  for (size_t i = 0; i < sizeof uses / sizeof *uses; i++)
    if (strcmp(uses[i].format, options->format) == 0) fprintf(out, "library_name: %s\n", uses[i].library);
  fprintf(out, "pipeline_tag: text-generation\ntags:\n- omniquant\n- %s\n- %d-bit\n---\n", options->format, job->scheme.bits);
  fprintf(out, "# %s, %s\n\n", printable(job->name).text, export_scheme_text(&job->scheme).text);
  fprintf(out, "Quantized by omniquant %s with [OmniQuant](https://arxiv.org/abs/2308.13137) and written in the format `%s`.\n\n",
          OMNIQUANT_VERSION, options->format);
}

static void write_use(FILE *out, const struct export_options *options, const struct export_job *job) {
  const struct export_scheme *scheme = &job->scheme;
  bool integer = strcmp(options->format, "compressed-tensors") == 0;
  fprintf(out, "## Use\n\n");
  for (size_t i = 0; i < sizeof uses / sizeof *uses; i++)
    if (strcmp(uses[i].format, options->format) == 0) fputs(uses[i].text, out);
  if (scheme->abits < 16 && !integer)
    fprintf(out, "\nIt was calibrated for activations of %d bits, which this folder does not quantize.\n", scheme->abits);
  if (scheme->kv_bits < 16)
    fprintf(out, "\nIt was calibrated for queries, keys and values of %d bits, which engines do not quantize by this folder alone.\n",
            scheme->kv_bits);
  fputc('\n', out);
}

static void write_recipe(FILE *out, const struct store_info *info) {
  const char *key;
  json_t *recipe = json_loads(info->recipe, 0, NULL), *value;
  fprintf(out, "## Recipe\n\n| setting | value |\n| --- | --- |\n");
  json_object_foreach(recipe, key, value) {
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_REAL_PRECISION(9));
    if (text) fprintf(out, "| %s | %s |\n", printable(key).text, printable(text).text);
    free(text);
  }
  json_decref(recipe);
  if (*info->tokens_sha256)
    fprintf(out, "\nCalibration tokens (little-endian uint32): SHA-256 `%s`.\n\n", info->tokens_sha256);
  else
    fprintf(out, "\nNo calibration tokens.\n\n");
}

static int write_result(FILE *out, const char *path, struct error *error) {
  double perplexity;
  int windows, seqlen, abits, kv_bits;
  json_int_t offset;
  json_error_t reason;
  json_t *result = json_load_file(path, 0, &reason);
  if (json_unpack_ex(result, &reason, 0, "{s:F, s:i, s:i, s:I, s:i, s:i}", "perplexity", &perplexity, "windows", &windows, "seqlen",
                     &seqlen, "offset", &offset, "abits", &abits, "kv_bits", &kv_bits))
    error_set(error, ERROR_INPUT, "%s: %s; --result takes what `omniquant eval --json` prints", path, printable(reason.text).text);
  else
    fprintf(out, "| %s | %d x %d, from token %lld | %d, %d | %.4f |\n",
            json_is_string(json_object_get(result, "quantized")) ? "quantized" : "full precision", windows, seqlen, (long long)offset,
            abits, kv_bits, perplexity);
  json_decref(result);
  return error->code;
}

static int write_results(FILE *out, const struct setting_texts *results, struct error *error) {
  fprintf(out, "## Perplexity\n\n");
  if (results->count == 0) {
    fprintf(out, "Not measured.\n");
    return 0;
  }
  fprintf(out, "Measured by `omniquant eval`:\n\n| weights | windows x tokens | bits of activations, of KV heads | perplexity |\n| --- | "
               "--- | --- | "
               "--- |\n");
  for (int i = 0; i < results->count; i++)
    if (write_result(out, results->text[i], error)) break;
  return error->code;
}

char *card_make(const struct export_options *options, const struct export_job *job, const struct store_info *info, struct error *error) {
  char *text = NULL;
  size_t length;
  FILE *out = open_memstream(&text, &length);
  if (out) {
    write_head(out, options, job);
    write_use(out, options, job);
    write_recipe(out, info);
    write_results(out, &options->results, error);
  }
  if (!out || fclose(out)) error_set(error, ERROR_WORK, "out of memory for the model card");
  if (!error->code) return text;
  free(text);
  return NULL;
}
