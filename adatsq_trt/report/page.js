"use strict";
// The maps of formats and of sensitivity show the same places: pointing at one marks it in both and says what it is.
{
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const place = document.getElementById("place");
  const steps = data.chosen.length, layers = data.layers.length;
  const superscript = (text) => [...text].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻").join("");
  const maps = [...document.querySelectorAll("#maps .drawing")].map((drawing) => {
    const image = drawing.querySelector("image");
    const mark = document.createElement("div");
    mark.className = "mark";
    mark.hidden = true;
    drawing.append(mark);
    drawing.classList.add("map");
    drawing.tabIndex = 0;
    return { drawing, image, mark };
  });
  let current = [0, 0];

  const scientific = (value) => {
    if (value === 0) return "0";
    const [mantissa, exponent] = value.toExponential(2).split("e");
    return `${mantissa} × 10${superscript(exponent.replace("+", ""))}`;
  };

  const say = (step, layer) => {
    const chosen = data.chosen[step][layer];
    place.replaceChildren();
    const add = (tag, text) => place.appendChild(document.createElement(tag)).append(text);
    add("b", data.layers[layer]);
    if (chosen < 0) {
      place.append(` does not run at step ${step}, which is of the other transformer`);
      return;
    }
    place.append(` at step ${step} (σ = ${data.sigmas[step]}) computes in `);
    add("b", data.formats[chosen]);
    place.append(document.createElement("br"), `${data.measure}: `);
    data.values.forEach((rows, i) => {
      const name = data.values.length > 1 ? `${data.formats[i]} ` : "";
      add(i === chosen && name ? "b" : "span", name + scientific(rows[step][layer]));
      place.append(" ");
    });
  };

  const show = (step, layer) => {
    current = [step, layer];
    for (const { drawing, image, mark } of maps) {
      const box = image.getBoundingClientRect(), outer = drawing.getBoundingClientRect();
      const width = box.width / steps, height = box.height / layers;
      mark.style.left = `${box.left - outer.left + step * width}px`;
      mark.style.top = `${box.top - outer.top + layer * height}px`;
      mark.style.width = `${width}px`;
      mark.style.height = `${height}px`;
      mark.hidden = false;
    }
    say(step, layer);
  };

  const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);
  for (const { drawing, image } of maps) {
    const point = (event) => {
      const box = image.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
      if (x >= 0 && x < 1 && y >= 0 && y < 1) show(Math.floor(x * steps), Math.floor(y * layers));
    };
    drawing.addEventListener("pointermove", point);
    drawing.addEventListener("pointerdown", point);
    drawing.addEventListener("focus", () => show(...current));
    drawing.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!move) return;
      event.preventDefault();
      show(clamp(current[0] + move[0], steps), clamp(current[1] + move[1], layers));
    });
  }
  addEventListener("resize", () => { if (!maps[0].mark.hidden) show(...current); });
}
// Left of the slider the quantized pictures, right of it those in full precision.
for (const input of document.querySelectorAll(".slide input")) {
  const slider = document.getElementById("slider");
  input.addEventListener("input", () => slider.style.setProperty("--at", `${input.value}%`));
}
