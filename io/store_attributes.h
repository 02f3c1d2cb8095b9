/* store_attributes.h: a store_info as attributes of an HDF5 group: the root of the master file, /run of a block file. */
#ifndef OMNIQUANT_STORE_ATTRIBUTES_H
#define OMNIQUANT_STORE_ATTRIBUTES_H

#include "hdf5_util.h"
#include "store_info.h"

/* What is written must be what store_attributes_read accepts. Errors: ERROR_INPUT. */
int store_attributes_check(const struct hdf5_site *site, const struct store_info *info);

int store_attributes_write(const struct hdf5_site *site, hid_t group, const struct store_info *info);

/* Reads and checks them. On failure (ERROR_INPUT) there is nothing to free. */
int store_attributes_read(const struct hdf5_site *site, hid_t group, struct store_info *info /* store_info_free */);

#endif
