//! transformers' block `{% generation %} ... {% endgeneration %}`, which marks what an assistant
//! wrote for training, and renders its content.

use std::borrow::Cow;

/// The template with each such block as a `with` block, which renders the same: the content, whose
/// variables end with it. Comments, raw blocks and texts in quotes stay as they are.
///
/// # Source
/// `AssistantTracker` in `utils/chat_template_utils.py` of transformers.
pub(super) fn without_generation_blocks(template: &str) -> Cow<'_, str> {
    if !template.contains("generation") {
        return template.into();
    }
    let mut text = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{").filter(|&start| start + 1 < rest.len()) {
        let (before, part) = rest.split_at(start);
        text += before;
        let length = match part.as_bytes()[1] {
            b'#' => part.find("#}").map_or(part.len(), |end| end + 2),
            b'{' => end_of_code(part, "}}"),
            b'%' => end_of_statement(part),
            _ => 1,
        };
        let (part, behind) = part.split_at(length);
        match replaced_tag(part) {
            Some((word, by)) => text += &part.replacen(word, by, 1),
            None => text += part,
        }
        rest = behind;
    }
    (text + rest).into()
}

/// What stands in a tag `{% word %}`, without the marks that trim spaces.
fn tag(part: &str) -> Option<&str> {
    let inside = part.strip_prefix("{%")?.strip_suffix("%}")?;
    let inside = inside.strip_prefix(['-', '+']).unwrap_or(inside);
    Some(inside.strip_suffix(['-', '+']).unwrap_or(inside).trim())
}

/// The word of a tag of the block, and the one to stand for it.
fn replaced_tag(part: &str) -> Option<(&'static str, &'static str)> {
    match tag(part)? {
        "generation" => Some(("generation", "with")),
        "endgeneration" => Some(("endgeneration", "endwith")),
        _ => None,
    }
}

/// Bytes of a statement; of a raw block, all of it.
fn end_of_statement(part: &str) -> usize {
    let end = end_of_code(part, "%}");
    if tag(&part[..end]) != Some("raw") {
        return end;
    }
    let mut from = end;
    while let Some(start) = part[from..].find("{%") {
        let start = from + start;
        let end = part[start..].find("%}").map_or(part.len(), |end| start + end + 2);
        if tag(&part[start..end]) == Some("endraw") {
            return end;
        }
        from = start + 2;
    }
    part.len()
}

/// Bytes up to the end of code that `close` ends, which does not count in quotes or brackets.
fn end_of_code(part: &str, close: &str) -> usize {
    let (mut quote, mut depth) = (None, 0usize);
    let mut letters = part.char_indices().skip(2);
    while let Some((at, letter)) = letters.next() {
        match (quote, letter) {
            (Some(_), '\\') => drop(letters.next()),
            (Some(open), _) if letter == open => quote = None,
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(letter),
            (None, _) if depth == 0 && part[at..].starts_with(close) => return at + close.len(),
            (None, '{' | '[' | '(') => depth += 1,
            (None, '}' | ']' | ')') => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    part.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_blocks_become_with_blocks() {
        for (template, expected) in [
            ("a{% generation %}b{% endgeneration %}c", "a{% with %}b{% endwith %}c"),
            ("{%- generation -%}b{%-endgeneration+%}", "{%- with -%}b{%-endwith+%}"),
            ("{{ x }}{%\n generation\n%}", "{{ x }}{%\n with\n%}"),
            ("{{ {'a': {}} }}{% generation %}", "{{ {'a': {}} }}{% with %}"),
        ] {
            assert_eq!(without_generation_blocks(template), expected);
        }
    }

    #[test]
    fn other_places_of_the_word_stay() {
        for template in [
            "{{ '{% generation %}' }}",
            "{{ \"it's \\\"{% generation %}\" }}",
            "{# {% generation %} #}",
            "{% raw %}{% generation %}{{{% endraw %}",
            "{%- raw -%}{% x %}{% endgeneration %}{%- endraw -%}",
            "{% if add_generation_prompt %}generation{% endif %}",
            "{% set generation = 1 %}{{ generation }}",
            "{% generation",
            "{{ '{% generation %}",
            "a { b {",
        ] {
            assert_eq!(without_generation_blocks(template), template);
        }
    }
}
