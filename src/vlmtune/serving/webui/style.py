"""How the page looks, on a desk and on a phone."""

# Installed fonts only: nothing is fetched from elsewhere.
FONT = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans CJK SC", "PingFang SC", "sans-serif"]
MONOSPACE = ["ui-monospace", "SFMono-Regular", "Consolas", "Noto Sans Mono CJK SC", "monospace"]

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important }
.gradio-container { padding: 0 !important; min-width: 0 !important; width: 100% }
.gradio-container .app, .gradio-container main, .gradio-container .wrap:has(> main) {
  width: 100% !important; box-sizing: border-box }
.gradio-container .app { padding: 8px !important; max-width: none !important }
.gradio-container main { padding: 0 !important; min-width: 0; gap: 10px }
footer { display: none !important }
.gradio-container .column, .gradio-container .row, .gradio-container .form,
.gradio-container .block { min-width: 0 !important }
#head { align-items: center; flex-wrap: nowrap; min-height: 36px }
#head > * { min-width: 0 !important }
#head h1 { font-size: 1.15rem; margin: 0; white-space: nowrap; overflow: hidden }
#head h1 { text-overflow: ellipsis }
#head h1 small { font-weight: 400; opacity: .65; margin-left: .6em }
#language { flex: 0 0 auto; width: auto }
#language .wrap { flex-wrap: nowrap; gap: 4px }
#language label { padding: 4px 10px; font-size: .85rem; white-space: nowrap }
#language label span { margin: 0 }
#language input { display: none }
.title { opacity: .85; padding: 0 4px }
.chat { height: max(340px, calc(100dvh - 225px)) !important }
.pair .chat { height: max(320px, calc(100dvh - 262px)) !important }
.pair > * { gap: 4px; flex: 1 1 0 !important; width: 100% }
.chat { width: 100% !important }
.chat button[title=Share], .chat .top-panel button[title=Clear] { display: none !important }
.chat img { max-height: 300px !important; width: auto !important; object-fit: contain }
.chat .katex-display { overflow-x: auto; overflow-y: hidden; padding: 6px 0 }
.chat .message-wrap { gap: 8px !important }
.chat .message-row { margin-top: 0 !important; margin-bottom: 0 !important }
.chat .bot:has(.thought-group) { padding: 0 !important; border: 0; background: none }
.chat .bot:has(.thought-group) { box-shadow: none }
.chat pre, .chat pre code { white-space: pre-wrap !important; overflow-wrap: anywhere }
#actions { justify-content: flex-start; gap: 8px }
#actions button { flex: 0 0 auto; min-width: 0 }
#examples, #examples .grid-wrap { min-height: 0 !important; height: auto !important }
#examples .grid-container { grid-auto-rows: auto !important; grid-template-rows: none !important;
  grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)) !important }
#examples .thumbnail-lg { aspect-ratio: 4 / 3; height: auto; background: #fff }
#examples .thumbnail-lg img { height: calc(100% - 32px) !important; position: absolute;
  top: 2px; left: 0 }
#examples .caption-label { font-size: .7rem; right: 2px; bottom: 2px; max-width: calc(100% - 4px) }
@media (max-width: 640px) {
  .gradio-container .app { padding: 4px !important }
  .chat { height: max(300px, calc(100dvh - 205px)) !important }
  .pair .chat { height: max(230px, calc(50dvh - 125px)) !important }
  .pair { flex-direction: column; align-items: stretch }
  .pair > * { flex: 0 0 auto !important; width: 100% !important }
  .chat img { max-height: 190px !important }
  #head h1 { font-size: 1rem }
  #examples .grid-container { grid-template-columns: repeat(3, 1fr) !important }
}
"""
