/* What the page does without asking the server. */
(function () {
  "use strict";

  function address(here) {
    const asked = ["group", "step", "metric"].filter((name) => here[name] !== null && here[name] !== undefined);
    const query = "?" + asked.map((name) => name + "=" + encodeURIComponent(here[name])).join("&");
    if (window.location.search !== query) window.history.replaceState(window.history.state, "", query);
  }

  /* Where the reader stands: the slider counts the steps. */
  function follow(index, known) {
    if (!known || !known.group) return null;
    const step = known.steps.length ? known.steps[Math.min(index, known.steps.length - 1)] : null;
    const here = { group: known.group, step: step, metric: known.metric, stamp: known.stamp };
    address(here);
    return here;
  }

  /* The step as text, also while the handle is dragged. */
  function say(dragged, here, known) {
    if (!here || here.step === null || !known || !known.steps || !known.steps.includes(here.step)) return "";
    const moving = window.dash_clientside.callback_context.triggered.some((t) => t.prop_id === "step.drag_value");
    const index = moving && dragged < known.steps.length ? dragged : known.steps.indexOf(here.step);
    const step = known.steps[index].toLocaleString("en");
    const text = "Step " + step;
    const thumb = document.querySelector("#bar [role=slider]");
    if (thumb) {
      thumb.setAttribute("aria-label", "Step");
      thumb.setAttribute("aria-valuetext", text);
    }
    return [text, " · " + (index + 1) + " of " + known.steps.length].join("");
  }

  /* The picture is made here, on white, at the size in which it is seen. */
  async function save(format, clicks, id) {
    if (!clicks) return window.dash_clientside.no_update;
    const key = JSON.stringify(id, Object.keys(id).sort());
    const graph = document.getElementById(key).querySelector(".js-plotly-plot");
    const name = graph.layout.meta.file;
    await window.Plotly.downloadImage(
      { data: graph.data, layout: Object.assign({}, graph.layout, { paper_bgcolor: "#ffffff" }) },
      { format: format, filename: name, width: graph.offsetWidth, height: graph.offsetHeight, scale: 2 }
    );
    return "Saved as " + name + "." + format;
  }

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    funcscope: {
      follow: follow,
      say: say,
      save_png: (clicks, id) => save("png", clicks, id),
      save_svg: (clicks, id) => save("svg", clicks, id),
    },
  });
})();
