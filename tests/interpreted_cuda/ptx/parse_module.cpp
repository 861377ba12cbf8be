// The text of a module: its variables, and where its kernels begin and end.
#include <stdexcept>

#include "program.h"
#include "text.h"

namespace ptx {

using std::string;

namespace {

// The bytes of `{1, 2, 3}`, of elements of the variable's type.
void initialise(Variable& variable, const string& declared, const string& values) {
  string head = declared.substr(0, declared.find('['));
  size_t unit = declaration(head).bytes, at = 0;
  string list = values[0] == '{' ? values.substr(1, values.rfind('}') - 1) : values;
  for (const string& item : split(list, ',')) {
    u64 value;
    if (!number(item, value)) throw std::runtime_error("PTX: the initial value `" + item + "` of `" + head + "`");
    if (at + unit > variable.room.size()) throw std::runtime_error("PTX: too many initial values of `" + head + "`");
    memcpy(variable.room.data() + at, &value, unit);
    at += unit;
  }
}

Kernel kernel_of(const string& head) {
  Kernel kernel;
  size_t open = head.find('('), close = head.rfind(')');
  kernel.name = words(head.substr(0, open)).back();
  u32 at = 0;
  if (open != string::npos) {
    for (const string& text : split(head.substr(open + 1, close - open - 1), ',')) {
      Declaration declared = declaration(text);
      at = (at + declared.align - 1) / declared.align * declared.align;
      kernel.parameters.push_back({declared.name, at, declared.bytes});
      at += declared.bytes;
    }
  }
  kernel.arguments.resize(at + 16);
  return kernel;
}

size_t end_of_block(const string& text, size_t open) {
  int depth = 0;
  for (size_t i = open; i < text.size(); i++) {
    if (text[i] == '{') depth++;
    if (text[i] == '}' && --depth == 0) return i;
  }
  throw std::runtime_error("PTX: a block that does not end");
}

}  // namespace

std::unique_ptr<Module> parse_module(const string& given) {
  auto module = std::make_unique<Module>();
  module->text = without_comments(given);
  const string& text = module->text;
  for (size_t at = text.find_first_not_of(" \t\r\n;"); at != string::npos; at = text.find_first_not_of(" \t\r\n;", at)) {
    bool is_of_one_line = begins_with(text, ".version", at) || begins_with(text, ".target", at) ||
                          begins_with(text, ".address_size", at) || begins_with(text, ".file", at);
    if (is_of_one_line) {
      at = text.find('\n', at);
      continue;
    }
    size_t end = text.find_first_of(";{", at);
    if (end == string::npos) throw std::runtime_error("PTX: `" + trimmed(text.substr(at, 100)) + "`");
    string head = text.substr(at, end - at);
    bool is_entry = head.find(".entry") != string::npos, is_function = head.find(".func") != string::npos;
    if (is_entry || is_function) {
      at = end + 1;
      if (text[end] == ';') continue;  // declared, not defined
      size_t close = end_of_block(text, end);
      if (is_entry) {
        Kernel kernel = kernel_of(head);
        kernel.body_begin = end + 1;
        kernel.body_end = close;
        module->kernels[kernel.name] = std::move(kernel);
      }
      at = close + 1;
      continue;
    }
    end = text.find(';', end);
    string whole = text.substr(at, end - at);
    size_t equals = whole.find('=');
    Declaration declared = declaration(whole);
    Variable& variable = module->variables[declared.name];
    variable.is_shared = declared.space == "shared";
    variable.is_external = declared.is_external;
    variable.room.resize(declared.bytes);
    if (equals != string::npos) initialise(variable, whole.substr(0, equals), trimmed(whole.substr(equals + 1)));
    at = end + 1;
  }
  return module;
}

}  // namespace ptx
