/* recipe.c: any bytes as a recipe: in YAML, as a user's file, or in JSON, as a store holds it. The first byte says which. */
#include "recipe.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"

static void check_recipe(const struct recipe *recipe) {
  size_t count;
  const struct setting *settings = recipe_settings(&count);
  struct recipe again;
  struct error error = {0};
  char *json = recipe_json(recipe);
  fuzz_expect(json != NULL, "a recipe is written as JSON");
  if (recipe_check(recipe, &error) == 0) {
    fuzz_expect(recipe_from_json(&again, json, "again", &error) == 0, "what is written can be read");
    for (size_t i = 0; i < count; i++) fuzz_expect(recipe_same(recipe, &again, &settings[i]), "what is written is what is read");
  }
  free(json);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  struct recipe recipe;
  struct error error = {0};
  int code;
  if (size == 0) return 0;
  struct fuzz_part part = {bytes + 1, size - 1};
  bool yaml = *bytes % 2 == 0;
  recipe_init(&recipe);
  if (yaml) {
    char path[500];
    fuzz_write("recipe.yaml", part);
    snprintf(path, sizeof path, "%s/recipe.yaml", fuzz_folder());
    fuzz_begin(size);
    code = recipe_load(&recipe, path, &error);
  } else {
    char *text = fuzz_text(part);
    fuzz_begin(size);
    code = recipe_from_json(&recipe, text, "store", &error);
    free(text);
  }
  fuzz_end();
  if (code) {
    fuzz_expect_refusal(code, &error);
    return 0;
  }
  check_recipe(&recipe);
  return 0;
}
