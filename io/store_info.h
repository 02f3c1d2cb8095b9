/* store_info.h: what a run is: the attributes of a store's master file, which every block file carries too, so that it tells by itself
 * where it belongs and the master can be made anew from any of them. */
#ifndef OMNIQUANT_STORE_INFO_H
#define OMNIQUANT_STORE_INFO_H

#include <stdbool.h>
#include <stddef.h>

#include "error.h"

enum { STORE_MAX_BLOCKS = 10000 }; /* block files are named by four digits */

struct store_info {
  char model_type[32];
  const char *recipe;       /* JSON text */
  const char *model_config; /* JSON text: the checkpoint's config.json */
  char tokens_sha256[65];   /* calibration tokens; empty for none */
  char model_sha256[65];    /* fingerprint of the checkpoint's weights; empty in stores of earlier versions */
  int blocks;               /* blocks of the whole model */
  int first_block;          /* blocks before it stay full precision */
};

/* A copy that owns its texts, for store_info_free. Errors: ERROR_WORK (memory); nothing to free then. */
int store_info_copy(struct store_info *copy, const struct store_info *info, const char *where, struct error *error);

/* Frees the texts of an info that was copied or read. */
void store_info_free(struct store_info *info);

/* Whether both are of one run; if not, `difference` says by what: "recipe: wbits is 3 there and 4 here". */
bool store_info_same(const struct store_info *there, const struct store_info *here, char difference[200]);

#endif
