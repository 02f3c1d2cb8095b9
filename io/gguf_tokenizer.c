/* gguf_tokenizer.c: reading tokenizer.json. */
#include "gguf_tokenizer.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "printable.h"

/* llama.cpp's kinds of tokens. */
enum token_type { TOKEN_NORMAL = 1, TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_USER_DEFINED, TOKEN_UNUSED, TOKEN_BYTE };

struct tokenizer {
  struct gguf_writer *writer;
  const char *folder;
  char path[4200]; /* of tokenizer.json */
  json_t *root, *config;
  const json_t *vocabulary, *merges;
  int count;
  const char **token; /* [count] by id, NULL for holes; in root */
  int32_t *type;      /* [count] */
};

/* How text is split before merging: pre_tokenizer of tokenizer.json, its parts one a line, and llama.cpp's name of it. */
#define CONTRACTIONS "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
#define SPACES       "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
static const struct {
  const char *name, *parts;
} splits[] = {
    {"gpt-2", "ByteLevel regex\n"},
    {"smollm", "Digits single\nByteLevel regex\n"},
    {"llama-bpe", "Split Isolated " CONTRACTIONS "\\p{N}{1,3}" SPACES "\nByteLevel\n"},
    {"qwen2", "Split Isolated " CONTRACTIONS "\\p{N}" SPACES "\nByteLevel\n"},
    {"falcon", "Punctuation Contiguous\nByteLevel regex\nDigits\nSplit Isolated [0-9][0-9][0-9]\n"},
};

static const char *text_at(const json_t *object, const char *key) {
  const char *text = json_string_value(json_object_get(object, key));
  return text ? text : "";
}

static int no_memory(const struct tokenizer *t, struct error *error) {
  return error_set(error, ERROR_WORK, "%s: out of memory", t->path);
}

static int refuse(const struct tokenizer *t, const char *key, const char *what, struct error *error) {
  return error_set(error, ERROR_INPUT, "%s: %s: %s", t->path, key, what);
}

/* ---- files ---- */

static json_t *read_json(const char *folder, const char *name, bool needed, struct error *error) {
  char path[4200];
  json_error_t reason;
  snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE *file = fopen(path, "rb");
  if (!file && (needed || errno != ENOENT))
    error_set(error, ERROR_INPUT, "%s: %s; GGUF holds the tokenizer, which has to be there as tokenizer.json", path, strerror(errno));
  if (!file) return NULL;
  json_t *root = json_loadf(file, 0, &reason);
  fclose(file);
  if (!json_is_object(root)) {
    error_set(error, ERROR_INPUT, "%s:%d: not a JSON object: %s", path, reason.line, printable(reason.text).text);
    json_decref(root);
    return NULL;
  }
  return root;
}

/* ---- how text is split ---- */

/* One part of the pre-tokenizer as a line; those that are not known become their type's name. */
static void describe_part(FILE *out, const json_t *part) {
  const char *type = text_at(part, "type");
  const json_t *regex = json_object_get(json_object_get(part, "pattern"), "Regex");
  if (strcmp(type, "Sequence") == 0) {
    size_t i;
    json_t *value;
    json_array_foreach(json_object_get(part, "pretokenizers"), i, value) describe_part(out, value);
    return;
  }
  fputs(type, out);
  if (strcmp(type, "ByteLevel") == 0) {
    const json_t *use = json_object_get(part, "use_regex");
    fprintf(out, "%s%s", json_is_true(json_object_get(part, "add_prefix_space")) ? " prefix" : "", json_is_false(use) ? "" : " regex");
  } else if (strcmp(type, "Digits") == 0) {
    fputs(json_is_true(json_object_get(part, "individual_digits")) ? " single" : "", out);
  } else if (strcmp(type, "Split") == 0 && json_is_string(regex)) {
    fprintf(out, " %s%s %s", text_at(part, "behavior"), json_is_true(json_object_get(part, "invert")) ? " inverted" : "",
            json_string_value(regex));
  } else if (strcmp(type, "Punctuation") == 0) {
    fprintf(out, " %s", text_at(part, "behavior"));
  }
  fputc('\n', out);
}

static int set_split(const struct tokenizer *t, const char *given, struct error *error) {
  char *parts = NULL;
  size_t length;
  FILE *out = open_memstream(&parts, &length);
  const char *name = given;
  if (!out) return no_memory(t, error);
  describe_part(out, json_object_get(t->root, "pre_tokenizer"));
  if (fclose(out)) return no_memory(t, error);
  for (size_t i = 0; i < sizeof splits / sizeof *splits && !name; i++)
    if (strcmp(splits[i].parts, parts) == 0) name = splits[i].name;
  free(parts);
  if (!name)
    return refuse(t, "pre_tokenizer", "how llama.cpp calls this way to split text is not known here; name it with --pre-tokenizer", error);
  gguf_text(t->writer, "tokenizer.ggml.pre", name);
  return 0;
}

/* ---- tokens ---- */

static int place_token(struct tokenizer *t, const char *text, const json_t *id, enum token_type type, struct error *error) {
  json_int_t index = json_is_integer(id) ? json_integer_value(id) : -1;
  if (index < 0 || index >= t->count)
    return error_set(error, ERROR_INPUT, "%s: token '%s': its number is not one of the model's %d tokens", t->path, printable(text).text,
                     t->count);
  t->token[index] = text;
  t->type[index] = (int32_t)type;
  return 0;
}

static int read_tokens(struct tokenizer *t, struct error *error) {
  const char *text;
  size_t i;
  json_t *value;
  json_object_foreach((json_t *)(uintptr_t)t->vocabulary, text,
                      value) if (place_token(t, text, value, TOKEN_NORMAL, error)) return error->code;
  json_array_foreach(json_object_get(t->root, "added_tokens"), i, value) {
    bool special = json_is_true(json_object_get(value, "special"));
    text = text_at(value, "content");
    if (place_token(t, text, json_object_get(value, "id"), special ? TOKEN_CONTROL : TOKEN_USER_DEFINED, error)) return error->code;
  }
  return 0;
}

/* The embedding may have more rows than there are tokens. */
static void put_tokens(const struct tokenizer *t) {
  gguf_texts(t->writer, "tokenizer.ggml.tokens", (uint64_t)t->count);
  for (int i = 0; i < t->count; i++) {
    char hole[24];
    snprintf(hole, sizeof hole, "[PAD%d]", i);
    const char *text = t->token[i] ? t->token[i] : hole;
    gguf_add_text(t->writer, text, strlen(text));
  }
  gguf_i32s(t->writer, "tokenizer.ggml.token_type", t->type, (uint64_t)t->count);
}

/* "left right", whichever way the file has it; NULL with the error set. Freed by the caller. */
static char *merge_text(const struct tokenizer *t, const json_t *merge, struct error *error) {
  const char *left = json_string_value(json_array_get(merge, 0)), *right = json_string_value(json_array_get(merge, 1));
  char *text = NULL;
  if (json_is_string(merge))
    text = strdup(json_string_value(merge));
  else if (left && right && asprintf(&text, "%s %s", left, right) < 0)
    text = NULL;
  if (json_is_string(merge) || (left && right)) {
    if (!text) no_memory(t, error);
  } else {
    refuse(t, "merges", "neither \"a b\" nor [\"a\", \"b\"]", error);
  }
  return text;
}

static int put_merges(const struct tokenizer *t, struct error *error) {
  size_t i;
  json_t *merge;
  gguf_texts(t->writer, "tokenizer.ggml.merges", json_array_size(t->merges));
  json_array_foreach(t->merges, i, merge) {
    char *text = merge_text(t, merge, error);
    if (!text) return error->code;
    gguf_add_text(t->writer, text, strlen(text));
    free(text);
  }
  return 0;
}

/* ---- sentencepiece: merges become scores ---- */

/* How it turns spaces into U+2581: as part of the normalizer, or as pre-tokenizer. Returns whether this is known. */
static bool sentencepiece_spaces(const struct tokenizer *t, bool *prefix) {
  const json_t *metaspace = json_object_get(t->root, "pre_tokenizer"), *normalizer = json_object_get(t->root, "normalizer");
  if (json_is_object(metaspace)) {
    const char *scheme = text_at(metaspace, "prepend_scheme");
    *prefix = strcmp(scheme, "never") != 0;
    return strcmp(text_at(metaspace, "type"), "Metaspace") == 0 && !json_is_true(json_object_get(metaspace, "split")) &&
           (!normalizer || json_is_null(normalizer));
  }
  size_t i;
  json_t *part;
  bool replaced = false;
  *prefix = false;
  json_array_foreach(json_object_get(normalizer, "normalizers"), i, part) {
    bool replace = strcmp(text_at(part, "type"), "Replace") == 0;
    if (strcmp(text_at(part, "type"), "Prepend") == 0)
      *prefix = true;
    else if (replace && strcmp(text_at(json_object_get(part, "pattern"), "String"), " ") == 0)
      replaced = true;
    else
      return false;
  }
  return replaced;
}

/* Each merge's place, by "left right", and each merged token's first, by the token. */
static int rank_merges(const struct tokenizer *t, json_t *places, json_t *firsts, struct error *error) {
  size_t i;
  json_t *merge;
  json_array_foreach(t->merges, i, merge) {
    char *text = merge_text(t, merge, error);
    if (!text) return error->code;
    json_object_set_new(places, text, json_true());
    char *space = strchr(text, ' ');
    if (space) memmove(space, space + 1, strlen(space));
    if (!json_object_get(firsts, text)) json_object_set_new(firsts, text, json_integer((json_int_t)i));
    free(text);
  }
  return 0;
}

/* sentencepiece joins any two tokens that make a third; merges can say less. Whether they say all for this one. */
static bool merges_complete(const struct tokenizer *t, const char *token, const json_t *places, struct error *error) {
  size_t length = strlen(token);
  char *left = malloc(length + 2);
  bool complete = left;
  if (!left) no_memory(t, error);
  for (size_t cut = 1; cut < length && complete; cut++) {
    if (((unsigned char)token[cut] & 0xc0) == 0x80) continue; /* inside a character */
    memcpy(left, token, cut);
    left[cut] = 0;
    if (!json_object_get(t->vocabulary, left) || !json_object_get(t->vocabulary, token + cut)) continue;
    left[cut] = ' ';
    memcpy(left + cut + 1, token + cut, length - cut + 1);
    complete = json_object_get(places, left);
  }
  free(left);
  return complete;
}

static int set_scores(const struct tokenizer *t, const json_t *places, const json_t *firsts, struct error *error) {
  float *score = malloc((size_t)t->count * sizeof *score);
  if (!score) return no_memory(t, error);
  for (int i = 0; i < t->count && !error->code; i++) {
    const json_t *first = t->token[i] ? json_object_get(firsts, t->token[i]) : NULL;
    score[i] = first ? -(float)json_integer_value(first) : -1e6f - (float)i;
    if (t->token[i] && t->type[i] == TOKEN_NORMAL && !merges_complete(t, t->token[i], places, error))
      error_set(error, ERROR_INPUT, "%s: merges: not all pairs that make '%s' are there, so that llama.cpp would split text otherwise",
                t->path, printable(t->token[i]).text);
  }
  if (!error->code) gguf_f32s(t->writer, "tokenizer.ggml.scores", score, (uint64_t)t->count);
  free(score);
  return error->code;
}

/* "<0x41>", and the token for what is not known. */
static void mark_bytes(struct tokenizer *t) {
  const char *unknown = text_at(json_object_get(t->root, "model"), "unk_token");
  for (int i = 0; i < t->count; i++) {
    const char *text = t->token[i];
    if (!text) continue;
    if (strlen(text) == 6 && strncmp(text, "<0x", 3) == 0 && strspn(text + 3, "0123456789ABCDEF") == 2 && text[5] == '>')
      t->type[i] = TOKEN_BYTE;
    if (*unknown && strcmp(text, unknown) == 0) t->type[i] = TOKEN_UNKNOWN;
  }
}

static int put_sentencepiece(struct tokenizer *t, struct error *error) {
  bool prefix;
  if (!sentencepiece_spaces(t, &prefix))
    return refuse(t, "normalizer", "BPE with byte fallback that does not treat spaces as LLaMA's does; GGUF cannot hold it", error);
  json_t *places = json_object(), *firsts = json_object();
  if (!places || !firsts) no_memory(t, error);
  mark_bytes(t);
  gguf_text(t->writer, "tokenizer.ggml.model", "llama");
  gguf_text(t->writer, "tokenizer.ggml.pre", "default");
  gguf_bool(t->writer, "tokenizer.ggml.add_space_prefix", prefix);
  put_tokens(t);
  if (!error->code && !rank_merges(t, places, firsts, error)) set_scores(t, places, firsts, error);
  json_decref(places);
  json_decref(firsts);
  return error->code;
}

/* ---- special tokens and chat ---- */

/* Number of a token; -1: not there. */
static int find_token(const struct tokenizer *t, const char *text) {
  for (int i = 0; i < t->count && *text; i++)
    if (t->token[i] && strcmp(t->token[i], text) == 0) return i;
  return -1;
}

/* The special token at the beginning or the end of what post-processing makes of a text; "" for none. */
static const char *template_token(const json_t *processor, bool end) {
  size_t i;
  json_t *part;
  const json_t *single = json_object_get(processor, "single");
  const char *found = text_at(json_object_get(json_array_get(single, end ? json_array_size(single) - 1 : 0), "SpecialToken"), "id");
  if (*found) return found;
  json_array_foreach(json_object_get(processor, "processors"), i, part) {
    found = template_token(part, end);
    if (*found) return found;
  }
  return "";
}

/* Whether the tokenizer adds it to a text: as tokenizer_config.json says, or tokenizer.json does. */
static bool adds(const struct tokenizer *t, const char *key, const char *token, bool end) {
  const json_t *says = json_object_get(t->config, key), *processor = json_object_get(t->root, "post_processor");
  if (json_is_boolean(says)) return json_is_true(says);
  return *token && strcmp(template_token(processor, end), token) == 0;
}

static const char *special_token(const struct tokenizer *t, const char *key) {
  const json_t *value = json_object_get(t->config, key);
  return json_is_string(value) ? json_string_value(value) : text_at(value, "content");
}

static void put_special(const struct tokenizer *t) {
  static const struct {
    const char *config, *key;
  } tokens[] = {{"bos_token", "tokenizer.ggml.bos_token_id"},
                {"eos_token", "tokenizer.ggml.eos_token_id"},
                {"unk_token", "tokenizer.ggml.unknown_token_id"},
                {"pad_token", "tokenizer.ggml.padding_token_id"}};
  for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
    int id = find_token(t, special_token(t, tokens[i].config));
    if (id >= 0) gguf_u32(t->writer, tokens[i].key, (uint32_t)id);
  }
  gguf_bool(t->writer, "tokenizer.ggml.add_bos_token", adds(t, "add_bos_token", special_token(t, "bos_token"), false));
  gguf_bool(t->writer, "tokenizer.ggml.add_eos_token", adds(t, "add_eos_token", special_token(t, "eos_token"), true));
}

static int put_chat(const struct tokenizer *t, struct error *error) {
  enum { LARGEST = 1 << 20 };
  char path[4200];
  size_t i;
  json_t *part;
  const json_t *value = json_object_get(t->config, "chat_template");
  const char *text = json_string_value(value);
  json_array_foreach(value, i, part) /* several by name */
      if (strcmp(text_at(part, "name"), "default") == 0) text = text_at(part, "template");
  snprintf(path, sizeof path, "%s/chat_template.jinja", t->folder);
  FILE *file = fopen(path, "rb");
  char *read = file ? calloc(LARGEST + 1, 1) : NULL;
  if (file && !read) no_memory(t, error);
  if (read && (fread(read, 1, LARGEST + 1, file) > LARGEST || ferror(file)))
    error_set(error, ERROR_INPUT, "%s: cannot be read, or is larger than %d bytes", path, LARGEST);
  if (file) fclose(file);
  if (read) text = read;
  if (text && !error->code) gguf_text(t->writer, "tokenizer.chat_template", text);
  free(read);
  return error->code;
}

/* ---- the whole ---- */

static int put_tokenizer(struct tokenizer *t, const char *pretokenizer, struct error *error) {
  const json_t *model = json_object_get(t->root, "model");
  t->vocabulary = json_object_get(model, "vocab");
  t->merges = json_object_get(model, "merges");
  if (strcmp(text_at(model, "type"), "BPE") != 0 || !json_is_object(t->vocabulary) || !json_is_array(t->merges))
    return refuse(t, "model", "not a BPE with vocabulary and merges, which are the only ones that can be written; use another format",
                  error);
  for (int i = 0; i < t->count; i++) t->type[i] = TOKEN_UNUSED;
  if (read_tokens(t, error)) return error->code;
  if (json_is_true(json_object_get(model, "byte_fallback"))) {
    if (put_sentencepiece(t, error)) return error->code;
  } else {
    gguf_text(t->writer, "tokenizer.ggml.model", "gpt2");
    if (set_split(t, pretokenizer, error)) return error->code;
    put_tokens(t);
    if (put_merges(t, error)) return error->code;
  }
  put_special(t);
  return put_chat(t, error);
}

int gguf_tokenizer(struct gguf_writer *writer, const char *folder, int vocabulary, const char *pretokenizer, struct error *error) {
  struct tokenizer t = {.writer = writer, .folder = folder, .count = vocabulary};
  snprintf(t.path, sizeof t.path, "%s/tokenizer.json", folder);
  t.root = read_json(folder, "tokenizer.json", true, error);
  t.config = error->code ? NULL : read_json(folder, "tokenizer_config.json", false, error);
  t.token = calloc((size_t)vocabulary, sizeof *t.token);
  t.type = calloc((size_t)vocabulary, sizeof *t.type);
  if (!t.token || !t.type)
    no_memory(&t, error);
  else if (!error->code)
    put_tokenizer(&t, pretokenizer, error);
  json_decref(t.root);
  json_decref(t.config);
  free(t.token);
  free(t.type);
  return error->code;
}
