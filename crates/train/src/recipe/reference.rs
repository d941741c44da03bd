//! The settings as the tables of `docs/recipe.md`, from their declarations.

use super::read::all_settings;

/// Every section and setting as Markdown.
pub fn reference() -> String {
    let mut out = String::new();
    for (section, settings) in all_settings() {
        match section {
            "" => out.push_str("### Above the first section\n\n"),
            section => out.push_str(&format!("### `[{section}]`\n\n")),
        }
        out.push_str("| setting | default | meaning |\n|---|---|---|\n");
        for setting in settings {
            let default = match setting.default.as_str() {
                "" => String::new(),
                default => format!("`{default}`"),
            };
            let doc = setting.doc.replace('|', "\\|");
            out.push_str(&format!("| `{}` | {default} | {doc} |\n", setting.name));
        }
        out.push('\n');
    }
    out
}
