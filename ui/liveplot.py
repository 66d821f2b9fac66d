"""Charts that grow while somebody looks at them: the drawn chart takes the new points, with zoom and pointer kept.

Gradio draws a chart anew each time its value changes. So only the first figure goes to `gr.Plot`; the later ones are
carried by a hidden `gr.HTML`, from where plotly takes them into the chart that is there.
"""

from __future__ import annotations

import plotly.graph_objects as go

from ui.layout import esc

# A figure may come before its chart is there: plotly.js has to be loaded first.
LIVE_PLOT_JS = """
const waiting = new Map();
function draw() {
  for (const [id, figure] of waiting) {
    const chart = document.querySelector(`#${id} .js-plotly-plot`);
    if (!chart || !window.Plotly) continue;
    waiting.delete(id);
    figure.layout.autosize = true;
    figure.layout.margin.autoexpand = true;
    window.Plotly.react(chart, figure.data, figure.layout, { responsive: true });
  }
}
watch('value', () => {
  for (const one of element.querySelectorAll('[data-figure]')) {
    waiting.set(one.dataset.chart, JSON.parse(one.dataset.figure));
  }
  draw();
});
const timer = setInterval(() => {
  if (!element.isConnected) clearInterval(timer);
  else if (waiting.size) draw();
}, 300);
"""


def carried(chart: str, figure: go.Figure) -> str:
    """A figure as hidden HTML, for a component with `LIVE_PLOT_JS`.

    Args:
        chart: `elem_id` of the `gr.Plot` that takes it.
        figure: What is drawn in place of what is there.
    """
    return f'<i hidden data-chart="{esc(chart)}" data-figure="{esc(figure.to_json())}"></i>'
