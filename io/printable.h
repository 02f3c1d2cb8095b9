/* printable.h: names out of strangers' files, made fit for a one-line message. */
#ifndef OMNIQUANT_PRINTABLE_H
#define OMNIQUANT_PRINTABLE_H

#include <stddef.h>

struct printable {
  char text[161];
};

/* Bytes of the UTF-8 character at the beginning of the text; 0 for what is none, and for control characters, of which U+0080 to U+009F are
 * commands to some terminals. */
static inline size_t printable_bytes(const char *text) {
  const unsigned char *byte = (const unsigned char *)text;
  size_t length = byte[0] < 0x80 ? 1 : byte[0] < 0xc2 ? 0 : byte[0] < 0xe0 ? 2 : byte[0] < 0xf0 ? 3 : byte[0] < 0xf5 ? 4 : 0;
  if (byte[0] < 0x20 || byte[0] == 0x7f || (byte[0] == 0xc2 && byte[1] < 0xa0)) return 0;
  for (size_t i = 1; i < length; i++)
    if ((byte[i] & 0xc0) != 0x80) return 0; /* the end of the text is none either */
  return length;
}

/* The text with what is no printable character replaced by '?', cut after 160 bytes. Use as printable(name).text in the call that prints
 * it. */
static inline struct printable printable(const char *text) {
  struct printable result;
  size_t length = 0;
  while (*text) {
    size_t bytes = printable_bytes(text), taken = bytes ? bytes : 1;
    if (length + taken >= sizeof result.text) break;
    for (size_t i = 0; i < taken; i++) result.text[length++] = bytes ? text[i] : '?';
    text += taken;
  }
  result.text[length] = 0;
  return result;
}

#endif
