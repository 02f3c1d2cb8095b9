/* printable.h: names out of strangers' files, made fit for a one-line message. */
#ifndef OMNIQUANT_PRINTABLE_H
#define OMNIQUANT_PRINTABLE_H

#include <stddef.h>

struct printable {
  char text[161];
};

/* The text with control characters replaced by '?', cut after 160 bytes. Use as printable(name).text in the call that prints it. */
static inline struct printable printable(const char *text) {
  struct printable result;
  size_t length = 0;
  for (; text[length] && length + 1 < sizeof result.text; length++) {
    unsigned char byte = (unsigned char)text[length];
    result.text[length] = byte < 0x20 || byte == 0x7f ? '?' : text[length];
  }
  result.text[length] = 0;
  return result;
}

#endif
