/* card.h: the model card, README.md of an export: what it is, how it was made and what it is worth. */
#ifndef OMNIQUANT_CARD_H
#define OMNIQUANT_CARD_H

#include "error.h"
#include "export.h"
#include "store.h"

/* The text, freed by the caller; NULL with the error set: ERROR_INPUT for a file of options->results that `omniquant eval --json` has not
 * written. */
char *card_make(const struct export_options *options, const struct export_job *job, const struct store_info *info, struct error *error);

#endif
