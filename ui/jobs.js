// The list's boxes: what is selected outlives the list being drawn anew; what is not shown any more is not selected.
// Clicks on the buttons are answered by the page's own handler, which gets the selected ids from `data-uids`.
const selected = new Set();
let anchor = null;   // the box that was clicked last: with Shift, all between it and the next one
let focused = null;  // finds what has the keyboard's focus again after the list was drawn anew

const boxes = () => [...element.querySelectorAll('[data-pick]')];

function show() {
  const all = boxes();
  const here = new Set(all.map((box) => box.value));
  for (const uid of [...selected]) if (!here.has(uid)) selected.delete(uid);
  for (const box of all) {
    box.checked = selected.has(box.value);
    box.closest('tr').toggleAttribute('data-selected', box.checked);
  }
  const every = element.querySelector('[data-all]');
  if (every) {
    every.checked = all.length > 0 && selected.size === all.length;
    every.indeterminate = selected.size > 0 && !every.checked;
  }
  const bulk = element.querySelector('[data-bulk]');
  if (!bulk) return;
  bulk.hidden = selected.size === 0;
  bulk.querySelector('[data-count]').textContent = selected.size + ' selected';
  for (const button of bulk.querySelectorAll('[data-needs]')) {
    const able = all.filter((box) => box.checked && box.dataset.can.split(' ').includes(button.dataset.needs));
    button.textContent = button.dataset.word.replace('{n}', able.length);
    if (button.dataset.to) {
      if (able.length) button.href = button.dataset.to + able.map((box) => box.value).join(',');
      else button.removeAttribute('href');
      button.toggleAttribute('aria-disabled', able.length === 0);
      continue;
    }
    // All of them are sent: the answer tells why some were left out.
    button.dataset.uids = [...selected].join(' ');
    button.disabled = able.length === 0;
    if (button.dataset.ask) button.dataset.confirm = button.dataset.ask.replace('{n}', able.length);
  }
}

function none() { selected.clear(); show(); }

element.addEventListener('click', (event) => {
  if (event.target.closest('[data-unselect]')) { none(); return; }
  const box = event.target.closest('[data-pick], [data-all]');
  if (!box) return;
  const all = boxes();
  let changed = [box];
  if ('all' in box.dataset) changed = all;
  else if (event.shiftKey && anchor !== null) {
    const ends = [all.findIndex((one) => one.value === anchor), all.indexOf(box)];
    if (ends[0] >= 0) changed = all.slice(Math.min(...ends), Math.max(...ends) + 1);
  }
  for (const one of changed) { if (box.checked) selected.add(one.value); else selected.delete(one.value); }
  anchor = 'all' in box.dataset ? null : box.value;
  show();
});

element.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && selected.size) { event.preventDefault(); none(); }
});

// A list that is drawn anew takes the focus away; it is given back to the same box, button or link.
function mark(target) {
  const text = (name, value) => `[${name}="${CSS.escape(value)}"]`;
  if ('all' in target.dataset) return '[data-all]';
  if ('pick' in target.dataset) return '[data-pick]' + text('value', target.value);
  if (target.dataset.needs) return text('data-needs', target.dataset.needs);
  if (target.dataset.act) return text('data-act', target.dataset.act) + text('data-uid', target.dataset.uid || '');
  return target.getAttribute('href') ? 'a' + text('href', target.getAttribute('href')) : null;
}
document.addEventListener('focusin', (event) => {
  focused = element.contains(event.target) ? mark(event.target) : null;
});
document.addEventListener('pointerdown', (event) => { if (!element.contains(event.target)) focused = null; });

watch('value', () => {
  show();
  if (focused && document.activeElement === document.body) {
    element.querySelector(focused)?.focus({ preventScroll: true });
  }
});
show();
