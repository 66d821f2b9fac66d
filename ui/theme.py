"""Colours, type and spacing of all pages, light and dark.

The fonts are the ones Gradio serves itself, so nothing is fetched from another host. `style.css` adds what
theme variables cannot express and uses only these variables and our own class names: Gradio's generated
class hashes change with every release.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from gradio.themes.utils import colors, sizes

HERE = Path(__file__).parent
CSS_PATH = HERE / "style.css"
HEAD_PATH = HERE / "head.html"

PETROL = colors.Color(
    name="petrol", c50="#eefaf8", c100="#d3f1ec", c200="#a8e2da", c300="#73ccc3", c400="#41b0a7", c500="#20938c",
    c600="#147671", c700="#135e5b", c800="#134b4a", c900="#133e3e", c950="#062524",
)  # fmt: skip
INK = colors.Color(
    name="ink", c50="#f6f8fa", c100="#edf0f4", c200="#dde2e9", c300="#c3cbd6", c400="#939dac", c500="#687384",
    c600="#4b5565", c700="#343d4b", c800="#1b222c", c900="#141a22", c950="#0d1117",
)  # fmt: skip


def theme() -> gr.themes.Base:
    """The Gradio theme: petrol on cool greys, IBM Plex, one-pixel borders and no heavy shadows."""
    # Only regular and bold: the semi-bold files that Gradio ships hold a few letters only.
    return gr.themes.Base(
        primary_hue=PETROL,
        secondary_hue=PETROL,
        neutral_hue=INK,
        radius_size=sizes.radius_md,
        text_size=sizes.text_md,
        spacing_size=sizes.spacing_md,
        font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=[gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_800",
        body_text_color_dark="#e4e9f0",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="#93a0b1",
        background_fill_primary="white",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_50",
        background_fill_secondary_dark="*neutral_800",
        border_color_primary="*neutral_200",
        border_color_primary_dark="#2a3340",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_border_width_dark="1px",
        block_shadow="none",
        block_radius="10px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_border_width_dark="0px",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="#a9b5c4",
        block_label_text_weight="600",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="#cdd6e1",
        block_title_text_weight="600",
        block_title_text_size="*text_sm",
        block_info_text_size="*text_sm",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="#93a0b1",
        input_background_fill="white",
        input_background_fill_dark="*neutral_950",
        input_border_width="1px",
        input_border_width_dark="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="#364152",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_400",
        input_shadow_focus="0 0 0 3px rgb(32 147 140 / 0.18)",
        input_shadow_focus_dark="0 0 0 3px rgb(65 176 167 / 0.22)",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover_dark="*primary_400",
        button_primary_text_color="white",
        button_primary_text_color_dark="#04211f",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="#364152",
        button_border_width="1px",
        button_border_width_dark="1px",
        button_large_padding="9px 18px",
        button_large_radius="8px",
        button_medium_radius="8px",
        button_small_radius="7px",
        checkbox_label_background_fill="white",
        checkbox_label_background_fill_dark="*neutral_950",
        checkbox_label_background_fill_selected="*primary_50",
        checkbox_label_background_fill_selected_dark="*primary_900",
        checkbox_background_color_selected="*primary_600",
        checkbox_border_color_selected="*primary_600",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        link_text_color_hover="*primary_600",
        link_text_color_hover_dark="*primary_200",
        link_text_color_visited="*primary_700",
        link_text_color_visited_dark="*primary_300",
        loader_color="*primary_500",
        slider_color="*primary_500",
    )
