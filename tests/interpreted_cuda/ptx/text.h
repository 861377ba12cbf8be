// Pieces of PTX text.
#pragma once
#include <string>
#include <vector>

#include "types.h"

namespace ptx {

std::string without_comments(const std::string& text);
std::string trimmed(const std::string& text);
std::vector<std::string> words(const std::string& text);
// Parts between separators that stand in no brackets, trimmed; none for an empty text.
std::vector<std::string> split(const std::string& text, char separator);
bool begins_with(const std::string& text, const std::string& with, size_t at = 0);
// Whether `text` is a number, of PTX's or C's spelling; its bits.
bool number(const std::string& text, u64& value);

// ".align 16 .b8 name[12]"
struct Declaration {
  std::string name, space;
  u32 bytes = 0, align = 1;
  bool is_external = false;
};
// Throws std::runtime_error where it is none.
Declaration declaration(const std::string& text);

}  // namespace ptx
