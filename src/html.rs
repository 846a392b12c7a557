//! Self-contained HTML pages: nothing is fetched, light and dark, wide and narrow.

use std::fmt::Write as _;

use crate::output::one_line;

const STYLE: &str = include_str!("html/page.css");
const SCRIPT: &str = include_str!("html/page.js");

/// A page that is being written.
pub struct Page {
    title: String,
    body: String,
}

impl Page {
    /// A page with a title, and a sentence below it.
    pub fn new(title: &str, lead: &str) -> Self {
        let body = format!("<header><h1>{}</h1><p>{}</p></header>\n", text(title), text(lead));
        Self { title: text(title), body }
    }

    /// Adds a section, whose `content` is HTML.
    pub fn section(&mut self, heading: &str, content: &str) {
        let _ = writeln!(self.body, "<section><h2>{}</h2>\n{content}</section>", text(heading));
    }

    /// The page as it is written to a file.
    pub fn finish(self) -> String {
        let Self { title, body } = self;
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; \
             style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <link rel=\"icon\" href=\"data:,\"><title>{title}</title>\n\
             <style>\n{STYLE}</style></head>\n<body><main>\n{body}</main>\n\
             <div id=\"tip\" role=\"status\" hidden></div>\n\
             <script>\n{SCRIPT}</script></body></html>\n"
        )
    }
}

/// Text, perhaps from a file, as HTML.
pub fn text(text: &str) -> String {
    let mut html = String::with_capacity(text.len());
    for c in one_line(text).chars() {
        match c {
            '&' => html.push_str("&amp;"),
            '<' => html.push_str("&lt;"),
            '>' => html.push_str("&gt;"),
            '"' => html.push_str("&quot;"),
            '\'' => html.push_str("&#39;"),
            c => html.push(c),
        }
    }
    html
}

/// Labels with their values, which are text.
pub fn facts<L: AsRef<str>>(facts: &[(L, String)]) -> String {
    let entry = |(label, value): &(L, String)| {
        format!("<div><dt>{}</dt><dd>{}</dd></div>\n", text(label.as_ref()), text(value))
    };
    format!("<dl>\n{}</dl>\n", facts.iter().map(entry).collect::<String>())
}

/// A table: a caption, the headings of the columns, and cells that are HTML. Columns from `right`
/// on stand to the right.
pub fn table<const N: usize>(
    caption: &str,
    right: usize,
    head: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
) -> String {
    let class = |column: usize| if column < right { "" } else { " class=\"n\"" };
    let mut html = format!(
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{0}\">\n<table>\
         <caption>{0}</caption>\n<thead><tr>",
        text(caption)
    );
    for (column, heading) in head.iter().enumerate() {
        let _ = write!(html, "<th scope=\"col\"{}>{}</th>", class(column), text(heading));
    }
    html += "</tr></thead>\n<tbody>\n";
    for row in rows {
        html += "<tr>";
        for (column, cell) in row.iter().enumerate() {
            let _ = match column {
                0 => write!(html, "<th scope=\"row\">{cell}</th>"),
                _ => write!(html, "<td{}>{cell}</td>", class(column)),
            };
        }
        html += "</tr>\n";
    }
    html + "</tbody></table></div>\n"
}

/// Content that is shown on request.
pub fn details(summary: &str, content: &str) -> String {
    format!("<details><summary>{}</summary>\n{content}</details>\n", text(summary))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_files_is_no_html() {
        let hostile = "<script>alert('x')</script>\u{202e}&\"\n";
        assert_eq!(
            text(hostile),
            "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;\\u{202e}&amp;&quot;\\n"
        );
        let mut page = Page::new(hostile, hostile);
        page.section(hostile, &facts(&[(hostile, hostile.to_owned())]));
        assert_eq!(page.finish().matches("<script>").count(), 1);
    }
}
