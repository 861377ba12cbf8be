#include "text.h"

#include <cctype>
#include <stdexcept>

namespace ptx {

using std::string;
using std::vector;

static bool is_space(char c) { return isspace(static_cast<unsigned char>(c)); }

string without_comments(const string& text) {
  string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size(); i++) {
    if (text.compare(i, 2, "//") == 0) {
      while (i < text.size() && text[i] != '\n') i++;
      out += '\n';
    } else if (text.compare(i, 2, "/*") == 0) {
      size_t end = text.find("*/", i + 2);
      i = end == string::npos ? text.size() : end + 1;
    } else {
      out += text[i];
    }
  }
  return out;
}

string trimmed(const string& text) {
  size_t first = text.find_first_not_of(" \t\n\r"), last = text.find_last_not_of(" \t\n\r");
  return first == string::npos ? "" : text.substr(first, last - first + 1);
}

vector<string> words(const string& text) {
  vector<string> out;
  for (size_t i = 0; i < text.size();) {
    while (i < text.size() && is_space(text[i])) i++;
    size_t begin = i;
    while (i < text.size() && !is_space(text[i])) i++;
    if (i > begin) out.push_back(text.substr(begin, i - begin));
  }
  return out;
}

vector<string> split(const string& text, char separator) {
  vector<string> out;
  int depth = 0;
  string part;
  for (char c : text) {
    if (c == '{' || c == '[' || c == '(') depth++;
    if (c == '}' || c == ']' || c == ')') depth--;
    if (c == separator && depth == 0) {
      out.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trimmed(part).empty()) out.push_back(trimmed(part));
  return out;
}

bool begins_with(const string& text, const string& with, size_t at) { return text.compare(at, with.size(), with) == 0; }

bool number(const string& text, u64& value) {
  if (text.size() < 1) return false;
  bool is_negative = text[0] == '-';
  string digits = text.substr(is_negative);
  if (digits.empty() || !isdigit(static_cast<unsigned char>(digits[0]))) return false;
  // 0f3F800000 and 0d3FF0000000000000 are the bits of floating-point numbers.
  if (digits.size() > 2 && digits[0] == '0' && (digits[1] == 'f' || digits[1] == 'F' || digits[1] == 'd' || digits[1] == 'D')) {
    value = std::stoull(digits.substr(2), nullptr, 16);
    return true;
  }
  while (digits.back() == 'U' || digits.back() == 'u') digits.pop_back();
  u64 magnitude = std::stoull(digits, nullptr, 0);
  value = is_negative ? u64(0) - magnitude : magnitude;
  return true;
}

Declaration declaration(const string& text) {
  Declaration out;
  string name;
  u32 unit = 0;
  vector<string> parts = words(text.substr(0, text.find('=')));
  for (size_t i = 0; i < parts.size(); i++) {
    const string& part = parts[i];
    if (part[0] != '.') {
      name += part;
    } else if (part == ".align" && i + 1 < parts.size()) {
      out.align = u32(std::stoul(parts[++i]));
    } else if (part == ".ptr") {  // of a parameter: what it points to is said by those that load
      while (i + 1 < parts.size() && parts[i + 1][0] == '.') i += parts[i + 1] == ".align" ? 2 : 1;
    } else if (part == ".extern") {
      out.is_external = true;
    } else if (part == ".shared" || part == ".global" || part == ".const" || part == ".local" || part == ".param") {
      out.space = part.substr(1);
    } else if (Type type = type_of(part.substr(1)); type != Type::none) {
      unit = u32(bytes_of(type));
    } else if (part != ".visible" && part != ".weak" && part != ".common") {
      throw std::runtime_error("PTX: `" + part + "` in the declaration `" + trimmed(text) + "`");
    }
  }
  size_t open = name.find('[');
  out.name = name.substr(0, open);
  if (out.name.empty() || !unit) throw std::runtime_error("PTX: the declaration `" + trimmed(text) + "`");
  out.bytes = unit;
  if (open != string::npos) {
    string length = name.substr(open + 1, name.find(']', open) - open - 1);
    out.bytes = length.empty() ? 0 : unit * u32(std::stoul(length));
  }
  out.align = std::max(out.align, unit);
  return out;
}

}  // namespace ptx
